"""Mistakes in calls: each is refused by its own error, in words, before anything changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import gift
from gift import DeltaBank, FineTuningStrategy
from gift.core.forwards import ForwardMethod, forward_method_of
from gift.core.io_spec import IOSpec
from gift.core.unfreeze import unfreeze
from gift.schedules import FreezeUnfreeze, RankAllocator, UnfreezeMilestones
from gift.strategies import AdaLoRAAllFineTuningStrategy, LoRAAllFineTuningStrategy

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def tuned(strategy: FineTuningStrategy | None = None) -> nn.Sequential:
    net = plain()
    gift.enable_fine_tuning(net, strategy or LoRAAllFineTuningStrategy(rank=1))
    return net


def banked() -> DeltaBank:
    bank = DeltaBank(plain())
    bank.add("a", strategy=LoRAAllFineTuningStrategy(rank=1))
    return bank


def state_of(schedule: Any, net: nn.Module) -> dict[str, Any]:
    schedule.attach(net)
    return copy.deepcopy(schedule.state_dict())


def other_blocks() -> Any:
    schedule, state = UnfreezeMilestones((1,)), state_of(UnfreezeMilestones((1,)), plain())
    schedule.attach(plain())
    state["blocks"]["9"] = state["blocks"].pop("0")
    return lambda: schedule.load_state_dict(state)


def other_parameters() -> Any:
    schedule, state = UnfreezeMilestones((1,)), state_of(UnfreezeMilestones((1,)), plain())
    schedule.attach(plain())
    state["blocks"]["0"] = ["0.weight"]
    return lambda: schedule.load_state_dict(state)


def allocators() -> tuple[RankAllocator, dict[str, Any]]:
    allocator = RankAllocator(target_rank=1, total_steps=10, warmup_steps=1, final_steps=1)
    allocator.attach(tuned(AdaLoRAAllFineTuningStrategy(rank=2)))
    return allocator, copy.deepcopy(allocator.state_dict())


def other_weights() -> Any:
    allocator, state = allocators()
    state["weights"] = ["9.weight"]
    return lambda: allocator.load_state_dict(state)


def a_list_for_a_state() -> Any:
    allocator, _ = allocators()
    return lambda: allocator.load_state_dict([])  # type: ignore[arg-type]


def two_parts() -> Any:
    net = nn.ModuleList([tuned(), tuned()])
    return lambda: FreezeUnfreeze(1).attach(net)


def two_of_a_name() -> Any:
    known = next(iter(gift.core.forwards.FORWARD_METHODS))
    return lambda: type(known, (ForwardMethod,), {"__module__": "elsewhere"})


MISTAKES: dict[str, tuple[Callable[[], Callable[[], Any]], Any, str]] = {
    "extract: no module": (
        lambda: lambda: gift.extract({}, plain(), 1),  # type: ignore[arg-type]
        TypeError, "expected a torch.nn.Module as the base, got dict"),
    "extract: iterations": (
        lambda: lambda: gift.extract(plain(), plain(), 1, iterations=-1),
        ValueError, "iterations is -1, expected an integer of at least 0 or None"),
    "extract: iterations for an error": (
        lambda: lambda: gift.extract(plain(), plain(), error=0.5, iterations=1),
        ValueError, "all singular values are needed: omit iterations"),
    "extract: a delta": (
        lambda: lambda: gift.extract(plain(), tuned(), 1),
        RuntimeError, "the tuned network has a delta already: save that, or merge it first"),
    "combine: a list": (
        lambda: lambda: banked().combine(["a"]),  # type: ignore[arg-type]
        TypeError, r"expected numbers by the names of deltas, got \['a'\]"),
    "a description without a task": (
        lambda: lambda: IOSpec.from_config({"task": 3, "classes": None}, None),
        TypeError, "expected the name of a task"),
    "classes that are no names": (
        lambda: lambda: IOSpec.from_config({"task": "t", "classes": [1]}, None),
        TypeError, "expected names of classes"),
    "unfreeze: an unknown parameter": (
        lambda: lambda: unfreeze(tuned(), ["9.weight"]),
        KeyError, r"the network has no parameters \['9.weight'\]"),
    "schedule: two parts": (
        two_parts, ValueError, r"several parts are being fine-tuned: \['0', '1'\]; attach to one"),
    "schedule: blocks of another network": (
        other_blocks, ValueError, r"it has blocks \['9'\] that are not here, and lacks \['0'\]"),
    "schedule: other parameters": (
        other_parameters, ValueError, r"in 0 \['0.weight'\] waited, here \['0.weight', '0.bias'\]"),
    "allocator: other weights": (
        other_weights, ValueError, r"its weights are \['9.weight'\], here \['0.weight', '2.weight"),
    "allocator: a list": (
        a_list_for_a_state, ValueError, r"expected a mapping with \[.*\], found list"),
    "wrapper: unknown": (
        lambda: lambda: forward_method_of("Nothing", {}), ValueError, "unknown wrapper 'Nothing'"),
    "wrapper: a setting": (
        lambda: lambda: forward_method_of(next(iter(gift.core.forwards.FORWARD_METHODS)), {"x": 1}),
        ValueError, r"has no setting \['x'\]; it has \["),
    "wrapper: a name twice": (two_of_a_name, ValueError, "the name .* is taken by gift"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    make, error, reason = MISTAKES[name]
    call = make()
    with pytest.raises(error, match=reason):
        call()
