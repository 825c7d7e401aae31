"""Schedules: what they freeze and unfreeze when, what norm layers do, what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from transformers import AlbertConfig, AlbertForSequenceClassification

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, ma_freeze, mc_type, pa_adapt, pc_path
from gift.methods import LoRA
from gift.schedules import (
    Freeze,
    FreezeUnfreeze,
    NoFreeze,
    Schedule,
    UnfreezeMilestones,
)
from gift.strategies import (
    BitFitFineTuningStrategy,
    FreezeStrategy,
    FullFineTuningStrategy,
    LoRAAllFineTuningStrategy,
)
from tests.cases.schedules import X, attached, moves, network, units
from tests.common import trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


# When.

Epochs = dict[int, list[str]]
WHEN: list[tuple[Schedule, Epochs]] = [
    (NoFreeze(), {0: ["0", "3", "8"]}),
    (Freeze(), {}),
    (FreezeUnfreeze(2), {2: ["0", "3", "8"]}),
    (FreezeUnfreeze(0), {0: ["0", "3", "8"]}),
    (UnfreezeMilestones((1, 3), 2), {1: ["3", "8"], 3: ["0"]}),
    (UnfreezeMilestones((1, 2, 4), 1), {1: ["8"], 2: ["3"], 4: ["0"]}),
    (UnfreezeMilestones((4,)), {4: ["0", "3", "8"]}),
    (UnfreezeMilestones((1, 3), 4, train_bn=None), {1: ["1", "3", "4", "8"], 3: ["0"]}),
]


@pytest.mark.parametrize(("schedule", "expected"), WHEN, ids=repr)
def test_blocks_are_unfrozen_when_they_are_due(schedule: Schedule, expected: Epochs) -> None:
    """Norm layers are not blocks where they are trained from the start. The report says as much."""
    schedule = copy.deepcopy(schedule)
    net = network()
    report = schedule.attach(net)
    epochs = {row.name: row.epoch for row in report.blocks if row.waiting}
    assert {e: [n for n in epochs if epochs[n] == e] for e in expected} == expected
    assert set(epochs.values()) - {None} == set(expected)
    trained = {"9"} | ({"1", "4"} if schedule.train_bn else set())
    for epoch in range(6):
        assert schedule.step(epoch) == expected.get(epoch, [])
        assert schedule.step(epoch) == []
        trained |= set(expected.get(epoch, []))
        assert set(units(net).split()) == trained


def test_a_resnet_is_unfrozen_by_residual_blocks() -> None:
    net = resnet18()
    report = UnfreezeMilestones((3, 8), 2).attach(net)
    waiting = {row.name: row.waiting for row in report.blocks if row.epoch == 3}
    convs = {
        name: sum(m.weight.numel() for m in net.get_submodule(name).modules()
                  if isinstance(m, nn.Conv2d))
        for name in ("layer4.0", "layer4.1")
    }  # fmt: skip
    assert waiting == convs
    assert [row.name for row in report.head] == ["fc"]
    lines = str(report).splitlines()
    assert lines[0] == "ResNet by UnfreezeMilestones(unfreeze_milestones=(3, 8), num_layers=2)"
    assert any(line.split() == ["layer4.1", "BasicBlock", "4,718,592", "2,048", "epoch", "3"]
               for line in lines)  # fmt: skip


def test_epochs_that_were_left_out_are_made_up_for() -> None:
    schedule = UnfreezeMilestones((1, 3), 1)
    attached(schedule)
    assert schedule.step(7) == ["0", "3", "8"]
    assert schedule.step(3) == []
    with pytest.raises(ValueError, match=r"\['0', '3'\] are trained since epoch 3 or before"):
        schedule.step(1)
    assert schedule.trained == ["0", "3", "8"]


def test_a_shared_layer_is_unfrozen_once() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=9, embedding_size=4, num_hidden_layers=3, **sizes)
    net, schedule = AlbertForSequenceClassification(config), NoFreeze()
    schedule.attach(net)
    new = schedule.step(0)
    assert len(new) == len(set(new))
    assert all(p.requires_grad for p in net.parameters())


# What.

ADDED = {"lora_A", "lora_B"}
OWN = {"weight", "bias"}
WHAT: list[tuple[str, set[str], set[str]]] = [
    ("weights", ADDED, OWN | ADDED),
    ("deltas", set(), ADDED),
    ("all", set(), OWN | ADDED),
]


@pytest.mark.parametrize(("unfreezes", "first", "then"), WHAT)
def test_weights_or_deltas_or_both_wait(unfreezes: Any, first: set[str], then: set[str]) -> None:
    """The head is trained as the strategy trains it."""
    schedule = FreezeUnfreeze(1, unfreezes=unfreezes)
    net = attached(schedule, LoRAAllFineTuningStrategy(rank=1))
    for epoch, expected in enumerate((first, then)):
        schedule.step(epoch)
        for block in ("0", "3", "8"):
            names = {name for name, p in net[int(block)].named_parameters() if p.requires_grad}
            assert names == expected
        assert {name for name, p in net[9].named_parameters() if p.requires_grad} == ADDED
        bn = {name for name, p in net[1].named_parameters() if p.requires_grad}
        assert bn == (set() if unfreezes == "deltas" else OWN)


class WithRaw(nn.Module):
    """A matrix of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(4))
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) @ self.mix)


def test_the_delta_of_a_raw_parameter_waits_with_it() -> None:
    net, schedule = WithRaw(), FreezeUnfreeze(1, unfreezes="deltas")
    caps = [(mc_type(nn.Linear), ma_adapt()), (pc_path("mix"), pa_adapt(rank=2))]
    enable_fine_tuning(net, FineTuningStrategy(caps[:1], caps[1:]))
    schedule.attach(net)
    added = ["mix_lora_B", "mix_lora_A"]
    for epoch, expected in enumerate(([], added)):
        schedule.step(epoch)
        assert [name for name in added if net.get_parameter(name).requires_grad] == expected


class Tied(nn.Module):
    """A vocabulary under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out, self.head = nn.Linear(4, 7, bias=False), nn.Linear(7, 2)
        self.out.weight = self.table.weight


def test_a_tied_weight_that_waits_is_trained_under_each_name() -> None:
    net, schedule = Tied(), FreezeUnfreeze(1)
    enable_fine_tuning(net, FullFineTuningStrategy())
    before = copy.deepcopy(net.state_dict())
    schedule.attach(net)
    schedule.step(0)
    assert not net.table.weight.requires_grad
    assert net.state_dict().keys() == before.keys()
    net.load_state_dict({name: value + 1 for name, value in before.items()})
    assert torch.equal(net.out.weight, before["table.weight"] + 1)


class HalfFrozenLoRA(LoRA):
    """Another author's method: a parameter of its own is frozen."""

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        made = super().init_parameters(matrix)
        return {**made, "lora_A": nn.Parameter(made["lora_A"], requires_grad=False)}


def test_what_a_method_freezes_stays_frozen() -> None:
    schedule = FreezeUnfreeze(1, unfreezes="all")
    cap = mc_type(nn.Linear, nn.Conv2d), ma_adapt(HalfFrozenLoRA(rank=1))
    net = attached(schedule, FineTuningStrategy([cap]))
    schedule.step(1)
    for block in (net[0], net[3], net[8]):
        assert block.weight.requires_grad
        assert block.lora_B.requires_grad
        assert not block.lora_A.requires_grad


def test_a_head_in_which_a_strategy_trains_nothing_is_trained_whole() -> None:
    net = attached(Freeze(train_bn=False), FreezeStrategy())
    assert trainable(net) == ["9.weight", "9.bias"]
    assert [p.shape for p in net.parameters()] == [(2, 8), (2,)]


def test_what_a_strategy_trains_in_place_waits_and_stays_among_the_parameters() -> None:
    schedule = FreezeUnfreeze(1, train_bn=None)
    net = attached(schedule, BitFitFineTuningStrategy())
    before = list(net.state_dict())
    assert trainable(net) == ["9.bias"]
    schedule.step(1)
    assert set(before) <= set(net.state_dict())
    assert len(trainable(net)) == 11


def test_what_was_frozen_before_stays_frozen() -> None:
    net, schedule = network(), NoFreeze()
    net[3].requires_grad_(False)
    row = {row.name: row for row in schedule.attach(net).blocks}["3"]
    assert (row.waiting, row.epoch) == (0, None)
    assert schedule.step(0) == ["0", "8"]
    with pytest.raises(ValueError, match=r"nothing at epoch 0: .* 10 that were frozen before"):
        NoFreeze().attach(network().requires_grad_(False))


def test_freezing_clears_gradients_that_an_optimizer_would_follow() -> None:
    net = network()
    net(X).sum().backward()
    Freeze(train_bn=False).attach(net)
    assert [name for name, p in net.named_parameters() if p.grad is not None] == [
        "9.weight", "9.bias"
    ]  # fmt: skip


def test_a_delta_that_waits_does_not_move_by_an_old_gradient() -> None:
    """Momentum and all: the optimizer was made, and has stepped, before the schedule came."""
    net = network()
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(X).sum().backward()
    FreezeUnfreeze(1, unfreezes="deltas").attach(net)
    waiting = {name: p.detach().clone() for name, p in net.named_parameters() if "0.lora" in name}
    optimizer.step()
    named = dict(net.named_parameters())
    assert waiting.keys() == {"0.lora_A", "0.lora_B"}
    assert all(torch.equal(named[name], value) for name, value in waiting.items())


def test_what_was_detached_waits_no_more() -> None:
    net, schedule = network(), FreezeUnfreeze(1, unfreezes="deltas")
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    before = trainable(net)
    schedule.attach(net)
    assert trainable(net) != before
    schedule.detach()
    assert trainable(net) == before
    net.requires_grad_(False)
    net.requires_grad_(True)
    assert trainable(net) == before


def test_blocks_that_are_named_leave_the_rest_frozen() -> None:
    schedule = NoFreeze(blocks=["3", "8"], train_bn=False)
    net = network()
    assert schedule.attach(net).rest == sum(
        p.numel() for i in (0, 1, 4) for p in net[i].parameters()
    )
    schedule.step(0)
    assert units(net) == "3 8 9"


# Norm layers.


BN: list[tuple[bool | None, tuple[bool, bool], tuple[bool, bool]]] = [
    (True, (True, True), (True, True)),
    (False, (False, False), (False, False)),
    (None, (False, False), (True, True)),
]


@pytest.mark.parametrize("strategy", [None, LoRAAllFineTuningStrategy(rank=1)])
@pytest.mark.parametrize(("train_bn", "frozen", "unfrozen"), BN)
def test_norm_layers_train_stand_still_or_follow(
    train_bn: bool | None, frozen: Any, unfrozen: Any, strategy: Any
) -> None:
    """Statistics and weights; whatever ``train()`` says, in copies and pickles too."""
    schedule = FreezeUnfreeze(1, train_bn=train_bn)
    net = attached(schedule, strategy)
    for epoch, expected in enumerate((frozen, unfrozen)):
        schedule.step(epoch)
        for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert (moves(twin, 1), twin[1].weight.requires_grad) == expected
    if strategy is not None:
        disable_fine_tuning(net)
        assert moves(net, 1)


def test_statistics_follow_blocks_of_deltas_too() -> None:
    """A norm layer without a delta of its own goes with the block before it."""
    schedule = UnfreezeMilestones((1, 2), 2, unfreezes="deltas", train_bn=None)
    net = attached(schedule, LoRAAllFineTuningStrategy(rank=1))
    seen = []
    for epoch in range(3):
        schedule.step(epoch)
        seen.append((moves(net, 1), moves(net, 4)))
    assert seen == [(False, False), (False, True), (True, True)]


def test_statistics_that_a_strategy_froze_stay_so() -> None:
    schedule = FreezeUnfreeze(1, train_bn=None, head="9", unfreezes="all")
    caps = [
        (mc_type(nn.BatchNorm2d), ma_freeze(statistics=True)),
        (mc_type(nn.Linear), ma_freeze()),
    ]
    net = attached(schedule, FineTuningStrategy(caps))
    schedule.step(1)
    assert not moves(net, 1)
