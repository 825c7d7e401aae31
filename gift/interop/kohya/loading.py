"""Loading a kohya file onto a network."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import weight_deltas
from gift.engine.enable import enabling_trained
from gift.errors import DeltaFileError, refuse
from gift.factories import ma_adapt, mc_path, pa_adapt, pc_path
from gift.files.container import read_tensors
from gift.interop.diffusers.networks import is_name
from gift.interop.kohya.forms import ReadDelta
from gift.interop.kohya.interpretation import interpret
from gift.interop.kohya.layers import Incompatible, Target, flat, is_layer
from gift.interop.report import PartReport
from gift.interop.text_encoders import elsewhere
from gift.quantization import dequantised
from gift.strategies.base import CapLike, FineTuningStrategy

PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_")

# Names of the published Stable Diffusion, Flux and SD3 models; diffusers has other names.
_ORIGINAL = re.compile(
    r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|double_blocks|single_blocks"
    r"|joint_blocks|diffusion_model)_"
)


class _Located(NamedTuple):
    """A module of a network, and its path there."""

    path: str
    module: nn.Module


def load_kohya(
    net: nn.Module,
    path: str | os.PathLike[str],
    prefix: str = "lora_unet_",
    rename: Callable[[str], str] | None = None,
) -> PartReport:
    """Fine-tune a plain network with the deltas in a file of kohya's sd-scripts or LyCORIS.

    Supports LoRA (with ``lora_mid``, and with DoRA's ``dora_scale`` of outputs), LoHa, LoKr, full
    deltas, (IA)^3 and GLoRA, for linear layers and convolutions. The strategy that it enables has
    registered parts only. Tucker decompositions become plain factors of the same rank, and a rank
    above the largest one of a matrix is reduced to it. GLoRA of LyCORIS, ``W + W A + B``, becomes
    the LoRA that it is for a frozen weight. Outputs are the same.

    Args:
        net: the network that the deltas were trained for.
        path: path of the file.
        prefix: prefix of this network in the file: ``lora_unet_`` for U-Nets and transformers,
            ``lora_te_``, ``lora_te1_``, ``lora_te2_`` for text encoders, ``lycoris_`` for files
            that LyCORIS itself wrote. Keys of other networks are skipped.
        rename: maps a layer's name in the file, without prefix, to its path in the network, for
            networks whose layers have other names.

    Returns:
        The report of `enable_fine_tuning`; its `left` counts the tensors of other networks.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: naming everything that does not fit; the network is unchanged.
        RuntimeError: if the network is already being fine-tuned.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.interop.kohya import load_kohya, save_kohya
        >>> from gift.strategies import LoRALinearFineTuningStrategy
        >>> net, fresh = (nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        >>> report = enable_fine_tuning(net, LoRALinearFineTuningStrategy())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_kohya(net, f"{folder}/lora.safetensors")
        ...     report = load_kohya(fresh, f"{folder}/lora.safetensors")
        >>> [name for name, p in fresh.named_parameters() if p.requires_grad]
        ['0.lora_B', '0.lora_A']
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
    problems: list[str] = []
    layers, left = _layers_in(read_tensors(path)[1], prefix, problems)
    targets = _targets(net, list(layers), rename, problems)
    found: dict[str, tuple[nn.Module, ReadDelta]] = {}
    holders = Counter(id(p) for m in net.modules() for p in m._parameters.values())
    for name, (place, module) in targets.items():
        try:
            found[place] = module, interpret(layers[name], _target(module, holders))
        except Incompatible as error:
            problems.append(f"{prefix}{name}: {error}")
    refuse(DeltaFileError, f"{path} does not fit {type(net).__name__}, nothing changed", problems)
    with enabling_trained(net, _strategy(found)) as report, torch.no_grad():
        for module, delta in found.values():
            tensors = weight_deltas(module)["weight"].tensors(module)
            for key, value in delta.values.items():
                tensors[key].copy_(value)
            if delta.bias is not None:
                bias = present_tensor(module, "bias")
                bias += delta.bias.to(bias)
    return PartReport(**vars(report), left=dict(left))


def _layers_in(
    tensors: Mapping[str, Tensor], prefix: str, problems: list[str]
) -> tuple[dict[str, dict[str, Tensor]], Counter[str]]:
    """Return the tensors of each layer of one network by layer name, and a count of the others."""
    layers: dict[str, dict[str, Tensor]] = {}
    left: Counter[str] = Counter()
    unknown = []
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        fitting = [p for p in {prefix, *PREFIXES} if name.startswith(p)]
        own = max(fitting, key=len, default=None)
        if own is None or not part:
            unknown.append(key)
        elif own == prefix:
            layers.setdefault(name.removeprefix(prefix), {})[part] = tensor
        else:
            left[own] += 1
    if unknown:
        theirs = any(is_name(key.partition(".")[0]) for key in unknown)
        hint = "; load_diffusers reads files of diffusers" * theirs
        problems.append(
            f"{len(unknown)} keys are not of this format: {', '.join(sorted(unknown))}{hint}"
        )
    if not layers:
        others = ", ".join(sorted(left)) or "of no network"
        problems.append(f"it has no keys with prefix {prefix!r}; those it has are {others}")
    return layers, left


def _targets(
    net: nn.Module,
    names: list[str],
    rename: Callable[[str], str] | None,
    problems: list[str],
) -> dict[str, _Located]:
    """Return the layer in the network for each layer name in the file."""
    known: dict[str, dict[int, _Located]] = {}
    paths: dict[int, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        first = paths.setdefault(id(module), path)
        known.setdefault(flat(path), {})[id(module)] = _Located(first, module)
    targets: dict[str, _Located] = {}
    claimed: dict[str, str] = {}
    absent = []
    for name in names:
        path = flat(rename(name) if rename else name)
        found = list(known.get(path, known.get(elsewhere(net, path, "_"), {})).values())
        layers = [one for one in found if is_layer(one.module)]
        if not found:
            absent.append(name)
        elif len(layers) > 1:
            same = " and ".join(layer.path for layer in layers)
            problems.append(f"{name} may be {same}: their names differ by dots alone")
        elif not layers:
            kind = type(found[0].module).__name__
            problems.append(
                f"{name} is a {kind}; such files are for linear layers and convolutions"
            )
        elif (other := claimed.setdefault(layers[0].path, name)) != name:
            problems.append(f"{other} and {name} are the same layer, {layers[0].path}")
        else:
            targets[name] = layers[0]
    original = sorted(name for name in absent if _ORIGINAL.match(name))
    if original:
        problems.append(
            f"{len(original)} layers, the first is {original[0]}, have names of the model as it "
            "was published, not of this network: give rename=, from these names to the network's"
        )
    if others := sorted(set(absent) - set(original)):
        problems.append(f"the network has no {', '.join(others)}")
    return targets


def _target(module: nn.Module, holders: Mapping[int, int]) -> Target:
    weight = present_tensor(module, "weight")
    if holders.get(id(weight), 0) > 1:
        raise Incompatible("its weight is tied to another layer's, which the file does not change")
    if is_lazy(weight) or weight.is_meta:
        raise Incompatible("its weight has no values yet")
    weight = dequantised(weight, module)
    if not weight.is_floating_point():
        raise Incompatible(f"its weight is {weight.dtype}, expected floating-point numbers")
    return Target(module, weight.detach())


def _strategy(found: Mapping[str, tuple[nn.Module, ReadDelta]]) -> FineTuningStrategy:
    """Create one cap for all layers with the same settings."""
    alike: dict[object, list[str]] = {}
    for place, (_, delta) in found.items():
        alike.setdefault(delta.key, []).append(place)
    module_caps: list[CapLike] = []
    para_caps: list[CapLike] = []
    for places in alike.values():
        delta = found[places[0]][1]
        if delta.weight_only:
            weights = [f"{place}.weight" for place in places]
            para_caps.append((pc_path(*weights), pa_adapt(delta.method, **delta.settings)))
        else:
            more = {"train_bias": True} if delta.bias is not None else {}
            action = ma_adapt(delta.method, **delta.settings, **more)
            module_caps.append((mc_path(*places), action))
    return FineTuningStrategy(module_caps, para_caps)
