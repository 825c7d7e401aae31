"""Mistakes in calls: each is refused by its own error, in words, before anything changes."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import gift
from gift import DeltaBank, FineTuningStrategy
from gift.core.dynamic_class import Spec, generated_class
from gift.core.forwards import ForwardMethod, forward_method_of
from gift.core.io_spec import IOSpec
from gift.core.unfreeze import refreeze, unfreeze
from gift.core.weights.attach import adapt_tensor
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_path
from gift.layers.layouts import LayoutOptions
from gift.methods import METHODS, Method
from gift.methods.lora import LoRA
from gift.schedules import FreezeUnfreeze, RankAllocator, UnfreezeMilestones, orthogonality
from gift.strategies import (
    AdaLoRAAllFineTuningStrategy,
    DoRAAllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
)
from tests.common import frozen_output

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


def moved_shapes() -> Any:
    allocator, state = allocators()
    state["sensitivity"] = {"0.weight.lora_A": torch.ones(3)}
    return lambda: allocator.load_state_dict(state)


def back() -> Any:
    schedule = FreezeUnfreeze(1)
    schedule.attach(plain())
    schedule.step(1)
    return lambda: schedule.step(0)


def waiting_elsewhere() -> Any:
    schedule, state = UnfreezeMilestones((1,)), state_of(UnfreezeMilestones((1,)), plain())
    schedule.attach(plain())
    state["trained"] = ["7"]
    return lambda: schedule.load_state_dict(state)


def another_schedule() -> Any:
    schedule = FreezeUnfreeze(1)
    state = state_of(UnfreezeMilestones((1,)), plain())
    schedule.attach(plain())
    return lambda: schedule.load_state_dict(state)


def on_top_of_a_lazy_one() -> Any:
    net = nn.Sequential(nn.LazyLinear(4))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    return lambda: gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1), stack=True)


def thrown_away() -> Any:
    net = plain()
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1), keep_base=False)
    unfreeze(net, ["0.weight"])
    return lambda: refreeze(net, ["0.weight"])


def of_another_class() -> Any:
    net = tuned()
    net.__class__ = type("Sharded", (type(net),), {})  # what fully_shard does
    return lambda: gift.disable_fine_tuning(net)


def swapped() -> Any:
    net = tuned()
    return lambda: setattr(net[0].weight, "__class__", nn.Parameter)  # as swap_tensors does


def resized() -> Any:
    net = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    return lambda: net.resize_token_embeddings(12)


def unscalable() -> Any:
    bank = banked()
    bank.activate("a")
    with torch.no_grad():
        bank.net[0].lora_B.fill_(1e38)
    bank.activate(None)
    return lambda: bank.scale("a", 1e9)


def active_already() -> Any:
    bank = banked()
    bank.activate("a")
    return lambda: bank.add("b")


def unpaddable() -> Any:
    bank = banked()
    bank.add("b", strategy=DoRAAllFineTuningStrategy(rank=1))
    return bank.pad


def of_other_names() -> Any:
    base, tuned = plain(), plain()
    return lambda: gift.extract(base, tuned.state_dict() | {"9.weight": torch.ones(2)}, 1)


def equal_networks() -> Any:
    base = plain()
    return lambda: gift.extract(base, copy.deepcopy(base), 1)


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
    "schedule: another one": (
        another_schedule, ValueError, r"it is of UnfreezeMilestones\(.*, this is FreezeUnfreeze\("),
    "schedule: what waits nowhere": (
        waiting_elsewhere, ValueError, r"it has \['7'\], which do not wait here"),
    "schedule: back": (back, ValueError, r"\['0', '2'\] are trained since epoch 1 or bef"),
    "schedule: not attached": (
        lambda: lambda: FreezeUnfreeze(1).step(0), RuntimeError, r"call schedule.attach"),
    "schedule: settings": (
        lambda: lambda: FreezeUnfreeze(1, unfreezes="half", train_bn=2, lr_ratio=True),  # type: ignore[arg-type]
        ValueError, "unfreezes is 'half'.*train_bn is 2, exp.*lr_ratio is True, expected a number"),
    "schedule: a block without a shape": (
        lambda: lambda: FreezeUnfreeze(1, head="1").attach(
            nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))),
        ValueError, "0.weight.*it has no shape yet: run a batch through the network first"),
    "schedule: unknown blocks": (
        lambda: lambda: FreezeUnfreeze(1, blocks=("9",)).attach(plain()),
        ValueError, r"no module is named as in blocks \['9'\]"),
    "allocator: another shape": (
        moved_shapes, ValueError, r"the sensitivity of \['0.weight.lora_A'.* has another sh"),
    "allocator: not attached": (
        lambda: RankAllocator(target_rank=1, total_steps=4).step,
        RuntimeError, r"call allocator.attach\(net\) first"),
    "orthogonality without AdaLoRA": (
        lambda: lambda: orthogonality(tuned()), ValueError, "has no weight with AdaLoRA"),
    "a stack on a delta without a shape": (
        on_top_of_a_lazy_one, ValueError, "has no shape yet, so no delta can be put on top"),
    "refreeze without the base": (
        thrown_away, RuntimeError, "0.weight cannot be frozen again: enable_fine_tuning had"),
    "disable: another class": (
        of_another_class, RuntimeError, "class of this Sharded was changed since .by fully_shard"),
    "swap an effective weight": (swapped, RuntimeError, "swapping it"),
    "resize embeddings": (resized, RuntimeError, "resize the token embeddings before"),
    "bank: scale beyond numbers": (
        unscalable, AdaptationError, r"nothing was scaled.*0.weight: its numbers would not be fin"),
    "bank: pad without factors": (
        unpaddable, AdaptationError, "cannot be padded.*b: 0.weight is changed by a method whose"),
    "bank: a name twice": (
        lambda: lambda: banked().add("a", strategy=LoRAAllFineTuningStrategy(rank=1)),
        ValueError, "there is a delta 'a' already: remove it first"),
    "bank: combine into a name": (
        lambda: lambda: banked().combine({"a": 1.0}, name="a"),
        ValueError, "there is a delta 'a' already: remove it first"),
    "bank: nothing to add": (
        active_already, ValueError, "nothing to add: give a file, a state or a strategy"),
    "bank: nothing to add of a plain network": (
        lambda: lambda: banked().add("b"), ValueError, "nothing to add: give a file, a state or"),
    "bank: a name that is none": (
        lambda: lambda: banked().add("", strategy=LoRAAllFineTuningStrategy(rank=1)),
        ValueError, "the name is '', expected some text"),
    "extract: a tensor more": (
        of_other_names, AdaptationError, "has 1 tensors that the base lacks: 9.weight"),
    "extract: equal networks": (equal_networks, AdaptationError, "both networks are equal"),
    "adapt what is not there": (
        lambda: lambda: adapt_tensor(nn.Linear(4, 4), "kernel", LoRA(rank=1), LayoutOptions()),
        AdaptationError, r"it has no tensor 'kernel'; it has \['weight', 'bias'\]"),
    "a class of an unknown method": (
        lambda: lambda: generated_class(nn.Linear, Spec(tensors=(("weight", "nothing"),))),
        ValueError, "unknown method 'nothing': import the file that registers it first"),
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
    with pytest.raises(error) as caught:
        call()
    assert re.search(reason, str(caught.value), re.DOTALL)


@dataclass(frozen=True)
class Halving(Method):
    """A method of somebody that does not keep the dtype of the matrix."""

    name: ClassVar[str] = "halving"
    strategy_prefix: ClassVar[str] = "Halving"
    result: str = "float16"

    def init_parameters(self, weight: Tensor) -> dict[str, Tensor]:
        return {"own": torch.zeros_like(weight)}

    def effective_weight(self, weight: Tensor, parameters: Any) -> Tensor:
        return (weight + parameters["own"]).to(getattr(torch, self.result))


def test_a_method_that_does_not_keep_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "halving", Halving)
    net, text = plain(), r"makes \(4, 4\) torch.float16 of a matrix \(4, 4\) torch.float32"
    with pytest.raises(ValueError, match=f"{text}; a method must keep both"):
        gift.enable_fine_tuning(net, FineTuningStrategy([(mc_path("0"), ma_adapt(Halving()))]))
    assert not list(gift.core.delta.named_deltas(net))
    cap = (mc_path("0"), ma_adapt(Halving(result="float32")))
    gift.enable_fine_tuning(net, FineTuningStrategy([cap]))
    x = torch.randn(2, 4)
    torch.testing.assert_close(net(x), frozen_output(net, x), rtol=0, atol=0)


def test_an_attribute_that_a_method_lacks_is_an_error_of_the_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python would take the frozen weight instead, without a word."""
    monkeypatch.setitem(METHODS, "halving", Halving)
    net, cap = plain(), (mc_path("0"), ma_adapt(Halving(result="float32")))
    gift.enable_fine_tuning(net, FineTuningStrategy([cap]))
    monkeypatch.setattr(Halving, "effective_weight", lambda self, *_: self.nothing)
    for read in (lambda: net[0].weight, lambda: net(torch.ones(2, 4))):
        with pytest.raises(RuntimeError, match=r"the effective 'weight' cannot be computed: .*"):
            read()
