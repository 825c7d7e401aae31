"""Loading a PEFT adapter onto a plain network."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gift.core.dynamic_class import Spec, spec_of
from gift.core.report import Report
from gift.core.undo.undo import tensor_of
from gift.core.weights.record import weight_deltas
from gift.engine.enable import enabling_trained
from gift.errors import DeltaFileError
from gift.factories import ma_adapt, ma_train, mc_path, pa_adapt, pa_train, pc_path
from gift.interop.peft.activated import (
    TOKENS,
    activated_incompatibilities,
    activated_strategy,
    put_activated,
)
from gift.interop.peft.folder import incompatibilities, read_folder
from gift.interop.peft.forms import Config, Read, Tensors
from gift.interop.peft.prompt import (
    PROMPT_OPTIONS,
    prompt_incompatibilities,
    prompt_strategy,
    put_prompt,
)
from gift.interop.peft.reading import Reading
from gift.strategies.base import CapLike, FineTuningStrategy
from gift.wrappers import is_invocation


def load_peft(net: nn.Module, folder: str | os.PathLike[str], **options: Any) -> Report:
    """Load an adapter that PEFT trained onto the same plain network, with its values.

    The strategy that it enables has registered caps only, so further training can be saved as
    usual. The tensors determine which layers are adapted and with which rank; the config is
    checked to agree. The folder is read as data, and no code from it is run. Its regular
    expressions are run, however, and a malicious one can take forever.

    Args:
        net: the base, as PEFT received it.
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        options: further arguments of `enable_fine_tuning`.

    Returns:
        The report of `enable_fine_tuning`.

    Raises:
        TypeError: if `net` is not a module.
        RuntimeError: if it is already being fine-tuned.
        DeltaFileError: naming everything in the folder that has no counterpart here or does not
            belong to this network; the network is unchanged.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
    refuse_fine_tuned(net)
    config, tensors = read_folder(folder)
    problems: list[str] = []
    strategy, put = _contents_of(net, config, tensors, problems)
    if strategy is None:
        what = f"{os.fspath(folder)} cannot be loaded on this {type(net).__name__}"
        raise DeltaFileError(f"{what}, which is unchanged", problems)
    with enabling_trained(net, strategy, **options) as report:
        put()
    return report


def _contents_of(
    net: nn.Module, config: Config, tensors: Tensors, problems: list[str]
) -> tuple[FineTuningStrategy | None, Callable[[], None]]:
    """Return the strategy of a folder, and what puts its values; no strategy with problems."""
    tokens = config.pop(TOKENS, None)
    problems += incompatibilities(config, tensors)
    if tokens is not None and not is_invocation(tokens):
        problems.append(f"{TOKENS} is {tokens!r}, expected a list of ids")
    if problems:
        return None, lambda: None
    if config["peft_type"] in PROMPT_OPTIONS:
        problems += prompt_incompatibilities(net, config, tensors)
        made = None if problems else prompt_strategy(config)
        return made, lambda: put_prompt(net, tensors)
    reading = Reading(net, config, tensors)
    problems += reading.problems
    if tokens is not None:
        problems += activated_incompatibilities(net, reading)
        made = None if problems else activated_strategy(tokens, reading)
        return made, lambda: put_activated(net, reading)
    return None if problems else strategy_of(reading), lambda: put_values(net, reading)


def refuse_fine_tuned(net: nn.Module) -> None:
    """Raise a `RuntimeError` if a network is already being fine-tuned, or a part of it."""
    if any(spec_of(module) != Spec() for module in net.modules()):
        raise RuntimeError(
            "the network is already being fine-tuned: call disable_fine_tuning first"
        )


def strategy_of(reading: Reading) -> FineTuningStrategy:
    """Create caps that name each module and parameter."""
    module_caps: list[CapLike] = []
    para_caps: list[CapLike] = []
    for claimed, group in _alike(reading):
        settings = group[0].options
        if claimed:
            paths = list(dict.fromkeys(str(read.claimed) for read in group))
            biased = group[0].claimed in reading.biased
            train_bias = {"train_bias": True} if biased else {}
            module_caps.append(
                (mc_path(*paths), ma_adapt(group[0].method, **settings, **train_bias))
            )
        else:
            names = [read.name for read in group]
            para_caps.append((pc_path(*names), pa_adapt(group[0].method, **settings)))
    if reading.whole:
        module_caps.append((mc_path(*reading.whole), ma_train()))
    if reading.trained:
        para_caps.append((pc_path(*reading.trained), pa_train()))
    return FineTuningStrategy(module_caps, para_caps)


def _alike(reading: Reading) -> list[tuple[bool, list[Read]]]:
    """Group what is adapted in the same way."""
    groups: dict[Any, list[Read]] = {}
    for read in reading.reads:
        settings = tuple(sorted(read.options.items()))
        key = (read.claimed is not None, read.method, settings, read.claimed in reading.biased)
        groups.setdefault(key, []).append(read)
    return [(key[0], group) for key, group in groups.items()]


def put_values(net: nn.Module, reading: Reading) -> None:
    """Write the values of a file into the deltas of the enabled network."""
    with torch.no_grad():
        for read in reading.reads:
            module = net.get_submodule(read.layer.path)
            tensors = weight_deltas(module)[read.layer.tensor].tensors(module)
            for key, value in read.values.items():
                tensors[key].copy_(value)
        for name, value in reading.in_place.items():
            path, _, last = name.rpartition(".")
            tensor_of(net.get_submodule(path), last).copy_(value)
