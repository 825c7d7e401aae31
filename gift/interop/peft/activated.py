"""Activated LoRA of PEFT: a LoRA whose config has ``alora_invocation_tokens``."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gift.core.forwards import forward_deltas, named_forward_deltas
from gift.factories import ma_activated_lora, ma_invocation, mc_path
from gift.interop.peft.forms import Config, Tensors, Written, plain, sizes
from gift.interop.peft.layers import kind_of
from gift.interop.peft.names import PREFIX, exactly
from gift.interop.peft.prompt import language_model_incompatibilities
from gift.interop.peft.reading import Reading
from gift.methods import method_of
from gift.strategies.base import CapLike, FineTuningStrategy
from gift.wrappers import ActivatedLoRA, Invocation

TOKENS = "alora_invocation_tokens"
_KINDS = ("linear", "transposed")


def is_activated(network: nn.Module) -> bool:
    """Whether activated LoRAs are the only wrapped forwards of a network."""
    found = [wrapper.method for *_, wrapper in named_forward_deltas(network)]
    return bool(found) and all(isinstance(m, ActivatedLoRA | Invocation) for m in found)


def write_activated(network: nn.Module, problems: list[str]) -> tuple[Config, Tensors]:
    """Write the activated LoRAs; nothing else may be trained."""
    problems += language_model_incompatibilities(network)
    written, found = Written(), {}
    readers: list[tuple[str, Any]] = []
    dropouts: set[float] = set()
    for path, module, wrapper in named_forward_deltas(network):
        method: Any = wrapper.method
        if isinstance(method, Invocation):
            readers.append((path, method))
            continue
        tensors = wrapper.tensors(module)
        written.add(path, {"lora_A.weight": tensors["A"], "lora_B.weight": tensors["B"]})
        found[path] = method.rank, plain(method.scaling * method.rank)
        dropouts.add(method.lora_dropout)
    if [path for path, _ in readers] != [""] or not found:
        problems.append("PEFT has one invocation for a language model, and layers in it")
        return {}, {}
    kinds = {kind_of(network.get_submodule(path)) for path in found}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "target_modules": exactly(written.targets, [name for name, _ in network.named_modules()]),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "fan_in_fan_out": kinds == {"transposed"},
        "init_lora_weights": True,
        TOKENS: readers[0][1].ids,
        **sizes(found, "lora_alpha"),
    }
    return config, {f"{PREFIX}{key}": tensor for key, tensor in written.tensors.items()}


def activated_incompatibilities(network: nn.Module, reading: Reading) -> Iterator[str]:
    """Yield why what PEFT trained is not an activated LoRA here."""
    yield from language_model_incompatibilities(network)
    if (task := reading.config.get("task_type")) != "CAUSAL_LM":
        yield f"task_type is {task!r}, expected 'CAUSAL_LM' with {TOKENS}"
    if reading.config.get("use_dora"):
        yield f"use_dora has no counterpart with {TOKENS}"
    if reading.in_place or reading.whole:
        yield f"tensors trained in place have no counterpart with {TOKENS}"
    for read in reading.reads:
        if read.claimed is None or read.layer.kind not in _KINDS:
            yield f"{read.name}: with {TOKENS}, gift adapts linear layers"


def activated_strategy(tokens: list[int], reading: Reading) -> FineTuningStrategy:
    """Return the strategy that finds the invocation, and names each layer."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for read in reading.reads:
        method: Any = method_of(read.method, read.settings)
        key = method.rank, method.scaling * method.rank, method.lora_dropout
        alike.setdefault(key, []).append(read.layer.path)
    caps: list[CapLike] = [(mc_path(""), ma_invocation(tokens))]
    for (rank, alpha, dropout), paths in alike.items():
        action = ma_activated_lora(rank, lora_alpha=alpha, lora_dropout=dropout)
        caps.append((mc_path(*paths), action))
    return FineTuningStrategy(caps)


def put_activated(network: nn.Module, reading: Reading) -> None:
    """Write the values of a file into the activated LoRAs."""
    with torch.no_grad():
        for read in reading.reads:
            module = network.get_submodule(read.layer.path)
            tensors = forward_deltas(module)[ActivatedLoRA.name].tensors(module)
            tensors["B"].copy_(read.values["lora_B"])
            tensors["A"].copy_(read.values["lora_A"])
