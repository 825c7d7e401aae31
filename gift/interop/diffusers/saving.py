"""Saving the deltas of networks as a file of diffusers."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gift.core.dynamic_class import spec_of
from gift.core.record import fine_tuned_part
from gift.errors import DeltaFileError, refuse
from gift.interop.diffusers.keys import file_key
from gift.interop.diffusers.networks import (
    METADATA,
    PEFT_TYPES,
    file_in,
    name_of,
    named_networks,
)
from gift.interop.peft.activated import TOKENS
from gift.interop.peft.forms import Config, Tensors
from gift.interop.peft.names import PREFIX
from gift.interop.peft.saving import contents_for
from gift.interop.text_encoders import in_all_versions, lead
from gift.interop.writing import dtype_problems, value_problems
from gift.support.atomic_files import replace_file


def save_diffusers(
    net: Any,
    path: str | os.PathLike[str],
    name: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save the deltas of one or several networks in the format of diffusers.

    ``pipeline.load_lora_weights(path)`` then gives the outputs of the fine-tuned networks. Supports
    LoRA, rsLoRA, LoRA-FA, PiSSA, OLoRA and DoRA, for linear layers and convolutions, with the
    changes that `gift.save_peft` makes. Ranks and alphas stand in the header, as diffusers 0.34 and
    later read them. LoKr of U-Nets and transformers is written as PEFT has it: diffusers 0.42 reads
    it by ``load_lora_adapter`` of such a network, and by the pipelines of Flux 2 and Z-Image.

    Args:
        net: the fine-tuned network, or a module that contains it; several by their names in the
            pipeline, ``{"unet": unet, "text_encoder": encoder}``; or a pipeline of diffusers, of
            which those networks are saved that are being fine-tuned.
        path: path of the file, which is written atomically; a folder gets
            ``pytorch_lora_weights.safetensors``.
        name: name of a single network in its pipeline: ``"unet"``, ``"transformer"``,
            ``"text_encoder"``, ``"text_encoder_2"``; ``""`` writes none, as
            ``save_lora_adapter`` of diffusers does. U-Nets and transformers need none: it follows
            from their class.
        dtype: dtype of the tensors in the file; None keeps their own.

    Raises:
        RuntimeError: if a network is not being fine-tuned.
        DeltaFileError: naming everything that such a file cannot hold; nothing is written.
    """
    file = file_in(path)
    problems = list(dtype_problems(dtype))
    tensors: Tensors = {}
    settings: Config = {}
    for own, one in _networks(net, name, problems).items():
        found: list[str] = []
        content, config = _part(fine_tuned_part(one), own, found)
        problems += [f"{own}: {problem}" if own else problem for problem in found]
        start = f"{own}." if own else ""
        tensors |= {f"{start}{key}": tensor for key, tensor in content.items()}
        settings |= {f"{start}{key}": value for key, value in config.items()}
    kept = {key: _own(tensor, dtype) for key, tensor in tensors.items()} if not problems else {}
    problems += value_problems(kept, dtype)
    refuse(DeltaFileError, f"{file} was not written", problems)
    text = json.dumps(settings, indent=2, sort_keys=True, allow_nan=False)
    metadata = {"format": "pt", METADATA: text}
    replace_file(file, lambda temporary: save_file(kept, temporary, metadata))


def _networks(net: Any, name: str | None, problems: list[str]) -> Mapping[str, nn.Module]:
    """Return the networks that are saved, by name."""
    nets = named_networks(net)
    if nets is not None:
        if name is not None:
            problems.append("name= is for a single network; here the networks have names")
        if not isinstance(net, Mapping):
            nets = {one: part for one, part in nets.items() if _is_fine_tuned(part)}
        if not nets:
            problems.append("there is no network that is being fine-tuned")
        problems += [f"{one!r}: a name cannot contain dots" for one in nets if "." in one]
        return nets
    part = fine_tuned_part(net)
    own = name_of(part) if name is None else name
    if own is None:
        problems.append(
            f"name= says what a {type(part).__name__} is called in its pipeline, such as "
            "'text_encoder' or 'transformer'"
        )
    return {own or "": part}


def _is_fine_tuned(net: nn.Module) -> bool:
    return any(spec_of(module).network for module in net.modules())


def _part(network: nn.Module, name: str, problems: list[str]) -> tuple[Tensors, Config]:
    """Return the tensors and settings of one network."""
    config, written = contents_for(network, problems)
    is_text = name.startswith("text_encoder")
    if config:
        problems += _not_held(config, is_text)
    start = lead(network, ".")
    tensors: Tensors = {}
    for key, tensor in written.items():
        key = file_key(start + key.removeprefix(PREFIX), is_text)
        if ".lora_embedding_" in key:
            problems.append(f"{key}: such files are for linear layers and convolutions")
        tensors[key] = tensor
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option, {})
        config[option] = {in_all_versions(network, p): value for p, value in patterns.items()}
    return tensors, {key: value for key, value in config.items() if value is not None}


def _not_held(config: Config, is_text: bool) -> Iterator[str]:
    """Yield what PEFT can hold, and pipelines of diffusers do not load."""
    if (kind := config["peft_type"]) not in PEFT_TYPES:
        yield f"such files hold LoRA, DoRA and LoKr, not {kind}"
    if kind == "LOKR" and is_text:
        yield "diffusers reads LoKr of U-Nets and transformers, of text encoders only LoRA"
    if TOKENS in config:
        yield "such files hold deltas that always act, not activated LoRA"
    if whole := config.get("modules_to_save"):
        yield f"trained or changed in place, which such files cannot hold: {', '.join(whole)}"
    if config.get("bias", "none") != "none":
        yield "biases are trained, which such files cannot hold"
    if single := config.get("target_parameters"):
        yield f"such files hold deltas of layers, not of single parameters: {', '.join(single)}"


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the tensor on the CPU in memory of its own."""
    found = tensor.detach().cpu()
    return (found if dtype is None else found.to(dtype)).contiguous().clone()
