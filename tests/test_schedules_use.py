"""Schedules in use: wrapped and changed networks, states, errors, own schedules, plain data."""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gift
from gift import disable_fine_tuning, enable_fine_tuning
from gift.schedules import (
    Freeze,
    FreezeUnfreeze,
    NoFreeze,
    Schedule,
    UnfreezeMilestones,
    load_schedule_from_config,
    register_schedule,
)
from gift.strategies import (
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)
from gift.support.recipes import REGISTRY
from tests.cases.schedules import X, attached, moves, network, units
from tests.common import all_bits, full_state, trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


# Networks in wrappers, and networks that are changed.


def test_a_second_schedule_takes_the_first_one_off() -> None:
    first, second = FreezeUnfreeze(1, train_bn=False), FreezeUnfreeze(1)
    net = attached(first, LoRALinearFineTuningStrategy(rank=1))
    first.step(1)
    second.attach(net)
    assert trainable(net) == trainable(attached(FreezeUnfreeze(1), LoRALinearFineTuningStrategy(1)))
    assert moves(net, 1)
    assert "3.weight" in net.state_dict(), "what was trained since is part of the result"


@pytest.mark.parametrize("strategy", [None, LoRAAllFineTuningStrategy(rank=1)])
def test_a_schedule_that_is_taken_off_leaves_the_flags_as_they_were(strategy: Any) -> None:
    net, schedule = network(), FreezeUnfreeze(1, train_bn=False, unfreezes="all")
    if strategy is not None:
        enable_fine_tuning(net, strategy)
    before = trainable(net)
    schedule.attach(net)
    assert trainable(net) != before
    schedule.step(1)
    schedule.detach()
    assert trainable(net) == before
    assert moves(net, 1)
    assert not schedule.is_attached
    if strategy is None:
        enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))  # it is a plain network again


def test_a_compiled_network_is_looked_into() -> None:
    net = network()
    assert NoFreeze().attach(torch.compile(net, backend="eager")).network == "Sequential"
    assert units(net) == "1 4 9"


def test_a_network_in_ddp_that_looks_for_unused_parameters() -> None:
    """What is unfrozen later is synchronised as well: here with itself, in one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        nets = [network(), network()]
        wrapped = DistributedDataParallel(nets[1], find_unused_parameters=True)
        for called in (nets[0], wrapped):
            schedule = FreezeUnfreeze(1)
            schedule.attach(called)
            optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
            for epoch in range(3):
                schedule.step(epoch, optimizer)
                optimizer.zero_grad()
                called(X).square().sum().backward()
                optimizer.step()
        assert all_bits(nets[0]) == all_bits(nets[1]) != all_bits(network())
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_around_the_network_may_have_the_head() -> None:
    inner = network()
    outer = nn.ModuleDict({"body": inner, "head": nn.Linear(2, 2)})
    enable_fine_tuning(inner, LoRAAllFineTuningStrategy(rank=1))
    schedule = UnfreezeMilestones((1, 2), 1)
    schedule.attach(outer)
    assert schedule.step(1) == ["body.9"]
    assert {"head.weight", "body.9.weight", "body.0.lora_A"} <= set(trainable(outer))
    assert "0.weight" not in inner.state_dict()
    schedule.step(2)
    assert "0.weight" in inner.state_dict()
    assert all_bits(disable_fine_tuning(inner)) == all_bits(network())


CHANGES: dict[str, Any] = {
    "enabled": (None, lambda net: enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))),
    "disabled": (LoRAAllFineTuningStrategy(rank=1), disable_fine_tuning),
    "merged": (LoRAAllFineTuningStrategy(rank=1), gift.merge),
}


@pytest.mark.parametrize(("strategy", "change"), CHANGES.values(), ids=CHANGES)
def test_a_network_must_be_as_it_was_attached_to(strategy: Any, change: Any) -> None:
    schedule = FreezeUnfreeze(1)
    net = attached(schedule, strategy)
    change(net)
    for call in (lambda: schedule.step(0), schedule.state_dict):
        with pytest.raises(RuntimeError, match="attach it after enable_fine_tuning"):
            call()


def test_a_schedule_waits_until_a_with_block_is_over() -> None:
    schedule = FreezeUnfreeze(1)
    net = attached(schedule, LoRAAllFineTuningStrategy(rank=1))
    with gift.disabled(net), pytest.raises(RuntimeError, match="outside of with blocks"):
        schedule.step(1)
    assert schedule.step(1) == ["0", "3", "8"]


# Errors, and states that do not fit.


def test_a_milestone_that_would_unfreeze_nothing_is_reported_with_what_there_is() -> None:
    net = network()
    before = full_state(net)
    for schedule, text in [
        (
            NoFreeze(unfreezes="deltas"),
            r"nothing at epoch 0: .*'deltas' finds 0 .* 0 of deltas",
        ),
        (UnfreezeMilestones((1, 3), 3), r"nothing at epoch 3: .* finds 3 blocks .*\(0, 3, 8\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            schedule.attach(net)
    assert full_state(net) == before


def test_packed_weights_cannot_be_unfrozen() -> None:
    torchao = pytest.importorskip("torchao")
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    torchao.quantize_(net, torchao.quantization.Int8WeightOnlyConfig())
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    with pytest.raises(ValueError, match="1 of them packed by quantising"):
        NoFreeze().attach(net)
    assert NoFreeze(unfreezes="deltas").attach(net).blocks[0].waiting == 64


SETTINGS: list[tuple[type[Schedule], dict[str, Any], str]] = [
    (NoFreeze, {"unfreezes": "heads"}, "unfreezes is 'heads', expected 'weights'"),
    (NoFreeze, {"train_bn": "no"}, "train_bn is 'no'"),
    (Freeze, {"lr_ratio": 0, "depth_decay": float("nan")}, "lr_ratio is 0.*; depth_decay is nan"),
    (FreezeUnfreeze, {"unfreeze_epoch": -1}, "unfreeze_epoch is -1"),
    (FreezeUnfreeze, {"unfreeze_epoch": -1, "lr_ratio": 0}, "lr_ratio is 0.*unfreeze_epoch is -1"),
    (UnfreezeMilestones, {"num_layers": 0, "lr_ratio": 0}, "lr_ratio is 0.*num_layers is 0"),
    (FreezeUnfreeze, {"unfreeze_epoch": True}, "unfreeze_epoch is True"),
    (UnfreezeMilestones, {"unfreeze_milestones": (3, 3)}, "expected rising epochs"),
    (UnfreezeMilestones, {"unfreeze_milestones": 3}, "expected rising epochs"),
    (UnfreezeMilestones, {"num_layers": 0}, "num_layers is 0"),
]


@pytest.mark.parametrize(("cls", "settings", "text"), SETTINGS)
def test_settings_out_of_range_are_named(cls: type[Schedule], settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cls(**settings)


def test_what_is_called_too_early_or_with_the_wrong_thing() -> None:
    schedule = NoFreeze()
    with pytest.raises(RuntimeError, match="not attached"):
        schedule.step(0)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        schedule.attach([])  # type: ignore[arg-type]
    attached(schedule)
    for epoch in (-1, 1.5, True):
        with pytest.raises(ValueError, match="expected an integer from 0"):
            schedule.step(epoch)  # type: ignore[arg-type]


def test_a_state_goes_back_to_where_it_is_from() -> None:
    """As for the best epoch: what was unfrozen since has the values of the base again."""
    schedule = UnfreezeMilestones((1, 3), 1, train_bn=None)
    net = attached(schedule, LoRAAllFineTuningStrategy(rank=1))
    schedule.step(1)
    state, best, then = schedule.state_dict(), copy.deepcopy(net.state_dict()), all_bits(net)
    flags = trainable(net)
    schedule.step(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
    schedule.load_state_dict(json.loads(json.dumps(state)))
    net.load_state_dict(best)
    assert (all_bits(net), trainable(net)) == (then, flags)
    assert not moves(net, 1)
    assert schedule.step(3) == ["0", "1", "3", "4"]


def test_the_state_of_another_schedule_or_network_changes_nothing() -> None:
    schedule, other = FreezeUnfreeze(1), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net = attached(schedule)
    theirs = {
        name: s for name, s in {"rate": FreezeUnfreeze(1, lr_ratio=0.5), "kind": NoFreeze()}.items()
    }
    states: dict[str, Any] = {}
    for name, one in theirs.items():
        one.attach(network())
        states[name] = one.state_dict()
    (small := FreezeUnfreeze(1)).attach(other)
    states |= {"net": small.state_dict(), "empty": {}, "list": []}
    before = full_state(net)
    texts = {"rate": "lr_ratio=0.5", "kind": "it is of NoFreeze", "net": r"head is \['1'\]",
             "empty": "found \\[\\]", "list": "found list"}  # fmt: skip
    for name, state in states.items():
        with pytest.raises(ValueError, match=texts[name]):
            schedule.load_state_dict(state)
    assert full_state(net) == before


# Own schedules, and schedules as plain data.

KINDS = [
    NoFreeze(),
    Freeze(head=["8", "9"], train_bn=None),
    FreezeUnfreeze(2, blocks=["0"], unfreezes="all"),
    UnfreezeMilestones((1, 3), 2, lr_ratio=0.2, depth_decay=0.5),
]


@dataclass(eq=False, repr=False)
class EveryOther(Schedule):
    """Every other block, from an epoch on."""

    start: int = 1

    def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
        """As it says."""
        return blocks[::2] if epoch >= self.start else []


def test_an_own_schedule_is_one_method() -> None:
    schedule = EveryOther(start=2)
    net = network()
    epochs = {row.name: row.epoch for row in schedule.attach(net).blocks if row.waiting}
    assert epochs == {"0": 2, "3": None, "8": 2}
    assert [schedule.step(epoch) for epoch in range(4)] == [[], [], ["0", "8"], []]


def test_an_own_schedule_that_names_nonsense_or_takes_blocks_back() -> None:
    class Nonsense(Schedule):
        def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
            return ["88"] if epoch else []

    class Wandering(Schedule):
        def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
            return [blocks[epoch % 2]]

    with pytest.raises(ValueError, match=r"Nonsense wants \['88'\].*closest names: \['8'\]"):
        Nonsense().attach(network())
    wandering = Wandering()
    net = attached(wandering)
    wandering.step(0)
    with pytest.raises(ValueError, match="a schedule only unfreezes"):
        wandering.step(1)
    assert units(net) == "0 1 4 9"


@pytest.mark.parametrize("schedule", KINDS, ids=repr)
def test_schedules_go_through_plain_data(schedule: Schedule) -> None:
    again = load_schedule_from_config(json.loads(json.dumps(schedule.to_config())))
    assert type(again) is type(schedule)
    assert repr(again) == repr(schedule)
    assert again.to_config() == schedule.to_config()


def test_files_name_registered_schedules_only() -> None:
    with pytest.raises(ValueError, match="cannot name"):
        EveryOther().to_config()
    register_schedule(EveryOther)
    try:
        config = EveryOther(start=3).to_config()
        assert load_schedule_from_config(config).start == 3  # type: ignore[attr-defined]
    finally:
        REGISTRY.pop("EveryOther")
    for named, text in [
        (config, r"'EveryOther'; known: \['Freeze', 'FreezeUnfreeze', 'NoFreeze', 'Unfreeze"),
        ({"name": "LoRAAllFineTuningStrategy", "init_paras": {}}, "unknown schedule"),
        ({"name": "Freeze", "init_paras": {"epoch": 1}}, "do not fit"),
        ({"name": "Freeze"}, "expected a mapping with 'name'"),
    ]:
        with pytest.raises(ValueError, match=text):
            load_schedule_from_config(named)
