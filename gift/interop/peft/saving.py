"""Saving a fine-tuned network as a folder for `peft.PeftModel.from_pretrained`."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gift.core.forwards import named_forward_deltas
from gift.core.record import fine_tuned_part
from gift.core.weights.record import present_weight_deltas
from gift.errors import DeltaFileError, refuse
from gift.interop.peft.activated import is_activated, write_activated
from gift.interop.peft.folder import CONFIG_DIGEST, CONFIG_NAME, WEIGHTS_NAME, config_digest
from gift.interop.peft.forms import Config, Form, Tensors, Written
from gift.interop.peft.inplace import InPlace
from gift.interop.peft.layers import (
    AdaptedTensor,
    context_incompatibilities,
    is_passed_by,
    kind_of,
    layer_incompatibilities,
)  # fmt: skip
from gift.interop.peft.names import PREFIX, ends_with, exactly, targeted
from gift.interop.peft.prompt import is_prompted, write_prompt
from gift.interop.peft.table import FORMS
from gift.layers.table import layout_of
from gift.private.diffusers import source_of
from gift.support.atomic_files import replace_files
from gift.support.sharding import is_sharded

DUMMY_TARGETS = "dummy-target-modules"  # PEFT's word for a config that adapts nothing


def save_peft(net: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a fine-tuned network in the format of PEFT.

    ``PeftModel.from_pretrained(base, folder)`` then returns a model with the outputs of `net`,
    where `base` is the network as it was before `enable_fine_tuning`. A head that was replaced by
    one of another size is saved as a whole; the base for PEFT must then have a head of that size.

    The methods that `gift.interop.peft.table` names, and the virtual tokens and prefixes of
    causal language models, have direct counterparts in PEFT. (Those that an encoder computes are
    saved as what it computes.) LoRA-FA, PiSSA and OLoRA are saved as a LoRA with the
    same product, and a convolution in the balanced layout as one of a higher rank. Parameters that
    are trained in place, and statistics that training changed, become `modules_to_save`. Tied
    tensors get equal adapters under each of their names. Anything that PEFT would compute
    differently is refused.

    Args:
        net: a network that is being fine-tuned, or a module that contains one.
        folder: folder for the two files. If writing is interrupted, it has the two old files, the
            two new files, or weights without a config, which cannot be loaded.

    Raises:
        RuntimeError: if nothing in `net` is being fine-tuned.
        DeltaFileError: naming everything for which PEFT has no counterpart; nothing is written.
    """
    network = fine_tuned_part(net)
    problems: list[str] = []
    config, tensors = contents_for(network, problems)
    refuse(DeltaFileError, f"{type(network).__name__} cannot be written for PEFT", problems)
    own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    target = Path(folder)
    metadata = {"format": "pt", CONFIG_DIGEST: config_digest(config)}
    replace_files({
        target / WEIGHTS_NAME: lambda path: save_file(own, path, metadata),
        target / CONFIG_NAME: lambda path: Path(path).write_text(text, encoding="utf-8"),
    })  # fmt: skip


def contents_for(network: nn.Module, problems: list[str]) -> tuple[Config, Tensors]:
    """Return the config and tensors of the files for a network that is being fine-tuned.

    Args:
        network: the network.
        problems: gets everything for which PEFT has no counterpart.
    """
    items = list(_adapted_tensors(network, problems))
    if is_prompted(network):
        if items or problems or InPlace(network, FORMS["LORA"], Written()).whole:
            problems.append("PEFT cannot train virtual tokens along with anything else")
        return write_prompt(network, problems)
    if is_activated(network):
        if items or problems or InPlace(network, FORMS["LORA"], Written()).whole:
            problems.append("PEFT cannot train an activated LoRA along with anything else here")
        return write_activated(network, problems)
    problems += [
        f"{path or 'the network'}: PEFT has no counterpart for {wrapper.method}"
        for path, _, wrapper in named_forward_deltas(network)
    ]
    form = _form_of(items, problems)
    if form is None:
        return {}, {}
    written = form.write(items) if items else Written()
    problems += written.problems
    in_place = InPlace(network, form, written)
    problems += in_place.problems
    config: Config = {
        "peft_type": form.peft_type,
        "auto_mapping": None,
        "base_model_name_or_path": source_of(network),
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": in_place.whole or None,
        **({"bias": in_place.bias} if form.bias else {}),
        **written.config,
    }
    names = [name for name, _ in network.named_modules()]
    if odd := [name for name in in_place.whole if not _means_itself(name)]:
        problems += [
            f"{name} is trained whole, and PEFT would read its name as a regular expression"
            for name in odd
        ]
        return {}, {}
    config["target_modules"] = exactly(written.targets, names)
    if not items:
        config["target_modules"] = DUMMY_TARGETS
    problems += _unlike(network, config, written)
    tensors = written.tensors | in_place.tensors
    problems += [f"{key} is complex" for key, tensor in tensors.items() if tensor.is_complex()]
    return config, {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()} | written.shared


def _means_itself(name: str) -> bool:
    """Whether a name, read as a regular expression, matches itself."""
    try:
        return re.fullmatch(name, name) is not None
    except re.error:
        return False


def _adapted_tensors(network: nn.Module, problems: list[str]) -> Iterator[AdaptedTensor]:
    """Yield the adapted tensors; those that PEFT could not adapt become problems."""
    names: dict[int, list[str]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    for path, module in network.named_modules():
        for tensor, delta in present_weight_deltas(module).items():
            form = _forms_by_method().get(delta.method.name)
            if delta.bias_of or (delta.owner is not None and form is not None and form.ties):
                continue
            item = AdaptedTensor(path, module, tensor, delta, _attention_of(network, path, tensor))
            found = list(_incompatibilities(network, item))
            if len(names[id(module)]) > 1:
                found.append(
                    f"PEFT adapts a module under its first name only, not {names[id(module)][1:]}"
                )
            problems += [f"{item.name}: {problem}" for problem in found]
            if not found:
                yield item


def _attention_of(network: nn.Module, path: str, tensor: str) -> str | None:
    parent, _, name = path.rpartition(".")
    if tensor == "in_proj_weight" and kind_of(network.get_submodule(path)) == "attention":
        return path
    is_projection = tensor == "weight" and name == "out_proj" and path
    return (
        parent if is_projection and kind_of(network.get_submodule(parent)) == "attention" else None
    )


def _incompatibilities(network: nn.Module, item: AdaptedTensor) -> Iterator[str]:
    delta, frozen = item.delta, item.module._parameters.get(item.tensor)
    if delta.layout is None:
        yield "it has no shape yet: run a batch through the network first"
        return
    if frozen is None:
        yield "it is computed before it is used (parametrised, normalised or pruned)"
    elif is_sharded(frozen):
        yield "it is spread over processes"
    own = layout_of(item.module, item.tensor, torch.Size(item.shape), delta.options)
    if (own.matrix, own.order) != (delta.layout.matrix, delta.layout.order):
        yield "it is tied to a tensor that PEFT reads transposed"
    path = item.path if item.attention is None else item.attention
    yield from context_incompatibilities(network, path)
    if path and is_passed_by(network, path):
        yield "in evaluation, nn.TransformerEncoderLayer ignores adapters of PEFT"
    form = _forms_by_method().get(delta.method.name)
    if form is None:
        return
    if item.attention is not None:
        yield from layer_incompatibilities(network.get_submodule(path), form.peft_type, form.kinds)
    elif item.is_layer:
        yield from layer_incompatibilities(item.module, form.peft_type, form.kinds)
    elif form.peft_type != "LORA":
        yield f"PEFT adapts single parameters by LoRA only, not by {delta.method.name}"


def _forms_by_method() -> dict[str, Form]:
    return {method: form for form in FORMS.values() for method in form.methods}


def _form_of(items: list[AdaptedTensor], problems: list[str]) -> Form | None:
    """Return the one form that all methods share."""
    if not items:
        return FORMS["LORA"]
    known, methods = _forms_by_method(), {item.delta.method.name for item in items}
    unknown = sorted(methods - set(known))
    if unknown:
        problems.append(f"PEFT has no counterpart for {', '.join(unknown)}")
    forms = {known[method].peft_type for method in methods - set(unknown)}
    if len(forms) > 1:
        problems.append(f"PEFT has one method for all layers, here there are {sorted(methods)}")
    return FORMS[forms.pop()] if len(forms) == 1 and not unknown else None


def _unlike(network: nn.Module, config: Config, written: Written) -> Iterator[str]:
    """Yield where names in the config would match other modules in PEFT."""
    names = [name for name, _ in network.named_modules()]
    meant = targeted(config, names) if config["target_modules"] != DUMMY_TARGETS else set()
    if meant != written.targets:
        yield (
            f"PEFT would adapt {sorted(meant)} instead of {sorted(written.targets)}, as it takes "
            f"what is below modules with the ends {config['modules_to_save']} for these"
        )
    own: list[Any] = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for name in written.parameters:
        others = [other for other in own if other != name and ends_with(other, [name])]
        if others:
            yield f"{name}: PEFT would adapt {others} as well, whose names end in the same way"
