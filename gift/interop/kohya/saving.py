"""Saving the deltas of networks as a kohya file."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gift.core.delta import present_deltas
from gift.core.dynamic_class import joined
from gift.core.record import fine_tuned_part, record_of
from gift.core.trained import moved_buffers, trained_of_the_base
from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import WeightDelta, present_weight_deltas
from gift.errors import DeltaFileError, refuse
from gift.interop.kohya.layers import Incompatible, flat, is_layer
from gift.interop.kohya.parts import parts_of
from gift.interop.text_encoders import lead
from gift.interop.writing import dtype_problems, value_problems
from gift.quantization import dequantised
from gift.support.atomic_files import replace_file


def save_kohya(
    net: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    prefix: str = "lora_unet_",
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save the deltas of one or several networks in the format of kohya's sd-scripts and LyCORIS.

    Supports LoRA, rsLoRA, LoRA-FA, PiSSA, OLoRA, DoRA, LoHa, LoKr, full deltas with trained biases,
    and (IA)^3 of weights alone, for linear layers and convolutions. PiSSA and OLoRA become LoRA of
    twice the rank. Factors for the balanced layout of a convolution, or for its groups, become
    factors of the whole matrix, with a larger rank. So do products of LoKr, one for each group
    or split as LyCORIS would not: their first factor is then one number.

    Args:
        net: the fine-tuned network, or a module that contains it, or several by their prefixes:
            ``{"lora_unet_": unet, "lora_te_": text_encoder}``.
        path: path of the file, which is written atomically.
        prefix: prefix of the keys, for a single network; see `load_kohya`.
        dtype: dtype of the tensors in the file, except alpha; None keeps their own.
        rename: maps a layer's path in its network to its name in the file, for programs that
            expect other names.
        metadata: further metadata, such as ``ss_base_model_version``.

    Raises:
        DeltaFileError: naming everything that such a file cannot hold; nothing is written.
    """
    nets = dict(net) if isinstance(net, Mapping) else {prefix: net}
    refuse(DeltaFileError, f"{path} was not written", _wrong_arguments(nets, dtype, metadata))
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    methods: set[str] = set()
    for own, given in nets.items():
        if "." in own:
            problems.append(f"{own!r}: a prefix cannot contain dots")
        try:
            one = fine_tuned_part(given)
        except RuntimeError as error:
            problems.append(f"the network for {own}: {error}")
            continue
        biases = dict(_changed_biases(one))
        problems += _kept_elsewhere(one, biases)
        for place, module, delta in _adapters(one, problems):
            methods.add(_algorithm(delta))
            name = rename(place) if rename else lead(one, "_") + place
            try:
                parts = _parts(delta, module, name)
            except Incompatible as error:
                problems.append(f"{place}: {error}")
                continue
            if place in biases:
                parts |= {"diff_b": biases[place]}
            for part, tensor in parts.items():
                key = f"{own}{flat(name)}.{part}"
                if key in tensors:
                    problems.append(f"{place}: another layer has the key {key} as well")
                # Alpha scales the whole delta, so it is not rounded; a flag stays an integer.
                keeps = dtype is None or part in ("alpha", "on_input")
                tensors[key] = tensor if keeps else tensor.to(dtype)
    problems += value_problems(tensors, dtype)
    refuse(DeltaFileError, f"{path} was not written", problems)
    kept = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in
            tensors.items()}  # fmt: skip
    described = _metadata(tensors, methods) | dict(metadata or {})
    replace_file(path, lambda temporary: save_file(kept, temporary, described))


def _parts(delta: WeightDelta, module: nn.Module, name: Any) -> dict[str, Tensor]:
    if not isinstance(name, str):
        raise Incompatible(f"rename gives {name!r}, expected a name")
    return parts_of(delta, module, dequantised(present_tensor(module, "weight"), module))


def _wrong_arguments(nets: Any, dtype: Any, metadata: Any) -> Iterator[str]:
    if not nets:
        yield "there is no network to write"
    yield from dtype_problems(dtype)
    pairs = dict(metadata or {}).items()
    wrong = {k: v for k, v in pairs if not (isinstance(k, str) and isinstance(v, str))}
    if wrong:
        yield f"metadata has {wrong}, expected texts"


def _adapters(net: Any, problems: list[str]) -> Iterator[tuple[str, nn.Module, WeightDelta]]:
    """Yield path, layer and delta of all that a file can hold; report all others as problems."""
    for path, module in net.named_modules():
        for tensor, delta in present_deltas(module).items():
            where = f"{path}.{tensor}".lstrip(".")
            if isinstance(delta, WeightDelta) and delta.bias_of:
                continue  # refused along with the weight
            if not isinstance(delta, WeightDelta):
                problems.append(f"{where}: such files cannot hold wrapped forward passes")
            elif delta.owner is not None:
                problems.append(f"{where} shares the delta of another tensor; in such files each "
                                "layer has its own")  # fmt: skip
            elif not is_layer(module) or tensor != "weight" or not path:
                problems.append(f"{where}: such files are for linear layers and convolutions "
                                "inside a network")  # fmt: skip
            elif delta.layout is None:
                problems.append(f"{where} has no values yet")
            else:
                yield path, module, delta


def _algorithm(delta: WeightDelta) -> str:
    """Return LyCORIS's name of a method."""
    name = "lora" if hasattr(delta.method, "lora_alpha") else delta.method.name
    return "full" if name == "full_delta" else name


def _changed_biases(net: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the layers with full deltas whose biases are trained in place, and their changes."""
    paths = {id(module): path for path, module in net.named_modules()}
    for module, name, base in record_of(net).undo.values:
        delta = present_weight_deltas(module).get("weight")
        if name == "bias" and delta is not None and delta.method.name == "full_delta":
            bias = present_tensor(module, "bias").detach()
            yield paths[id(module)], (bias - base.to(bias)).cpu()


def _kept_elsewhere(net: Any, biases: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield problems for trained tensors and buffers that are neither deltas nor these biases."""
    held = {joined(path, "bias") for path in biases}
    if trained := [name for name, _ in trained_of_the_base(net) if name not in held]:
        yield f"trained in place, which such files cannot hold: {', '.join(trained)}"
    if changed := list(moved_buffers(net)):
        yield (
            "buffers that changed while training, or may have (keep_base=False): "
            + ", ".join(changed)
        )
    if not any(present_weight_deltas(module) for module in net.modules()):
        yield f"{type(net).__name__} has no delta"


def _metadata(tensors: Mapping[str, Tensor], methods: set[str]) -> dict[str, str]:
    """Return the metadata that programs show, and that LyCORIS writes."""
    dims = {_dim(key, tensor) for key, tensor in tensors.items()} - {None}
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    plain = methods == {"lora"} and not any(key.endswith("dora_scale") for key in tensors)
    described = {
        "format": "pt",
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(dims.pop()) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if not plain and len(methods) == 1:
        described["ss_network_args"] = json.dumps({"algo": next(iter(methods))})
    return described


def _dim(key: str, tensor: Tensor) -> int | None:
    names = ("lora_down.weight", "hada_w1_b", "lokr_w2_b")
    return len(tensor) if key.endswith(names) else None
