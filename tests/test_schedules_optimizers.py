"""Unfrozen parameters in optimizers: groups, learning rates under every scheduler, resuming."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from gift import FineTuningStrategy, enable_fine_tuning
from gift.schedules import FreezeUnfreeze, NoFreeze, Schedule, UnfreezeMilestones
from gift.strategies import (
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    merge_strategies,
)
from gift.training import finetune
from tests.cases.selection import cells
from tests.common import enabled

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
Optimizers = {
    "adamw": partial(optim.AdamW, lr=1e-2, weight_decay=0.1),
    "sgd": partial(optim.SGD, lr=1e-1, momentum=0.9, nesterov=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def rates(optimizer: optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def train(net: nn.Module, optimizer: optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all values are equal, those of frozen parameters too."""
    states = nn.Module.state_dict(one), nn.Module.state_dict(other)
    assert list(states[0]) == list(states[1])
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# A step that unfreezes, beside the same done by hand.


@pytest.mark.parametrize("make", Optimizers.values(), ids=Optimizers)
@pytest.mark.parametrize("filtered", [True, False], ids=["of trained ones", "of all"])
def test_a_run_is_the_one_that_is_written_by_hand(make: Any, filtered: bool) -> None:
    """Whether the optimizer was made of what is trained first, or of all parameters."""
    net, hand = network(), network()
    schedule = UnfreezeMilestones((1, 3), num_layers=1, depth_decay=0.5, lr_ratio=0.2)
    schedule.attach(net)
    first = [p for p in net.parameters() if p.requires_grad]
    optimizer = make(first if filtered else net.parameters())
    hand.requires_grad_(False)
    hand[7].requires_grad_(True)
    hand[1].requires_grad_(True)
    by_hand = make([*hand[1].parameters(), *hand[7].parameters()])
    rate = by_hand.param_groups[0]["lr"]
    for epoch in range(5):
        for layer, ratio in {1: [(5, 0.2)], 3: [(3, 0.1), (0, 0.05)]}.get(epoch, []):
            hand[layer].requires_grad_(True)
            by_hand.add_param_group({"params": hand[layer].parameters(), "lr": rate * ratio})
        schedule.step(epoch, optimizer)
        train(net, optimizer)
        train(hand, by_hand)
        assert same(net, hand), epoch
    assert rates(optimizer) == pytest.approx([rate, rate * 0.2, rate * 0.1, rate * 0.05])
    sizes = [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups]
    assert sizes == [43, 72, 72, 56]


def test_deltas_that_waited_move_to_a_group_with_their_state() -> None:
    """They are in the optimizer from the start, as ``net.parameters()`` has them."""
    net = enabled(network(), LoRAAllFineTuningStrategy(rank=1))
    schedule = FreezeUnfreeze(unfreeze_epoch=1, unfreezes="deltas")
    schedule.attach(net)
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    waiting = [net[0].lora_A, net[3].lora_A]
    before = [p.detach().clone() for p in waiting]
    schedule.step(0, optimizer)
    train(net, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(waiting, before, strict=True))
    state = optimizer.state[net[7].lora_A]
    optimizer.state[net[0].lora_A]["marked"] = torch.ones(1)
    schedule.step(1, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 6]
    assert optimizer.state[net[7].lora_A] is state
    assert "marked" in optimizer.state[net[0].lora_A]


def test_layers_that_wait_in_one_group_get_rates_of_their_own() -> None:
    net = network()
    schedule = UnfreezeMilestones((1, 3), num_layers=1, depth_decay=0.5, lr_ratio=0.2)
    schedule.attach(net)
    layers: list[Any] = [net[0], net[3], net[5], net[7]]
    waiting = [p for layer in layers[:3] for p in layer.parameters()]
    head = [p for p in net.parameters() if not any(p is other for other in waiting)]
    optimizer = optim.SGD([{"params": head, "lr": 1.0}, {"params": waiting, "lr": 3.0}])
    for epoch in range(4):
        schedule.step(epoch, optimizer)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer, ratio in zip(layers, (0.05, 0.1, 0.2, 1.0), strict=True):
        assert [found[id(p)] for p in layer.parameters()] == pytest.approx([ratio, ratio])


def test_parameters_keep_the_settings_of_the_group_that_they_had() -> None:
    """Two groups, one without weight decay, are two groups after unfreezing."""
    net, schedule = network(), NoFreeze()
    schedule.attach(net)
    named = dict(nn.Module.named_parameters(net))
    split = [[p for n, p in named.items() if n.endswith(end)] for end in ("weight", "bias")]
    decays = [{"params": part, "weight_decay": d} for part, d in zip(split, (0.1, 0), strict=True)]
    optimizer = optim.AdamW(decays, lr=1.0)
    schedule.step(0, optimizer)
    groups = [(len(g["params"]), g["weight_decay"], g["lr"]) for g in optimizer.param_groups]
    assert groups == [(2, 0.1, 1.0), (2, 0, 1.0), (3, 0.1, 0.1), (3, 0, 0.1)]


def test_new_biases_get_the_settings_of_the_biases_of_the_head() -> None:
    net, schedule = network(), NoFreeze(train_bn=False)
    schedule.attach(net)
    groups = [{"params": [net[7].weight]}, {"params": [net[7].bias], "weight_decay": 0}]
    optimizer = optim.AdamW(groups, weight_decay=0.1)
    schedule.step(0, optimizer)
    groups = [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in optimizer.param_groups]
    assert groups == [(0.1, {2}), (0, {1}), (0.1, {2}), (0, {1})]


def plus(net: nn.Module, make: Any, flipped: bool) -> optim.Optimizer:
    """LoRA+: `lora_B` at 16 times the rate, and nothing decays that is a vector."""
    own = {id(p) for p in net.parameters()}  # those that wait too, where they are deltas
    named = {n: p for n, p in net.named_parameters() if id(p) in own}
    groups = [
        {"params": [p for n, p in named.items() if ("lora_B" in n) == b and (p.ndim > 1) == m],
         "lr": 1.6e-3 if b else 1e-4, "weight_decay": 0.1 if m else 0.0}
        for b in (False, True) for m in (True, False)
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    return make(groups[::-1] if flipped else groups, lr=1e-4)


def test_a_delta_is_raised_over_the_lowest_rate_of_its_own_layer() -> None:
    strategy = merge_strategies([HeadReplacementStrategy(3), LoRAAllFineTuningStrategy(rank=1)])
    net, schedule = enabled(network(), strategy), FreezeUnfreeze(1, unfreezes="all", lr_ratio=0.5)
    schedule.attach(net)

    def rate(name: str) -> float:
        """One layer has ten times the rates of the others."""
        return 1e-4 * (10 if name.startswith("0.lora") else 1) * (16 if "lora_B" in name else 1)

    own = {id(p) for p in net.parameters()}
    named = {n: p for n, p in net.named_parameters() if id(p) in own}
    optimizer = optim.SGD([{"params": [p], "lr": rate(n)} for n, p in named.items()], lr=1e-4)
    schedule.step(1, optimizer)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(named[name])] for name in ("0.lora_A", "0.lora_B")}
    assert found == pytest.approx({"0.lora_A": 1e-4 * 0.5, "0.lora_B": 1e-4 * 0.5 * 16})


@cells(
    3,
    head=["lora", "new head", "trained biases"],
    name=["SGD", "AdamW", "RMSprop", "NAdam"],
    flipped={"in order": False, "flipped": True},
)
def test_each_group_follows_the_group_of_the_head_that_it_resembles(
    head: str, name: str, flipped: bool
) -> None:
    """`lora_B` that of `lora_B`; weights and biases of the base never the raised one."""
    strategy = {
        "lora": LoRAAllFineTuningStrategy(rank=1),
        "new head": merge_strategies(
            [HeadReplacementStrategy(3), LoRAAllFineTuningStrategy(rank=1)]
        ),
        "trained biases": LoRAAllFineTuningStrategy(rank=1, train_bias=True),
    }[head]
    net, schedule = enabled(network(), strategy), FreezeUnfreeze(1, unfreezes="all", lr_ratio=0.5)
    schedule.attach(net)
    first = {id(p) for p in net.parameters() if p.requires_grad}  # the head, and norm layers
    optimizer = plus(net, getattr(optim, name), flipped)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.step(1, optimizer)
    for expected in (1.0, 0.5, 1 / 3):
        train(net, optimizer, steps=1)
        names = {id(p): n for n, p in net.named_parameters()}
        seen = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                raised = 16 if "lora_B" in names[id(p)] else 1
                ratio = 1 if id(p) in first else 0.5
                assert group["lr"] == pytest.approx(1e-4 * raised * ratio * expected), names[id(p)]
                seen[names[id(p)]] = group["weight_decay"]
        assert {"0.weight", "0.bias", "0.lora_A", "0.lora_B", "3.weight"} <= set(seen)
        decayed = {n for n, decay in seen.items() if decay}
        assert {"0.weight", "0.lora_A", "0.lora_B"} <= decayed
        if head != "lora":  # the head has a bias of its own to resemble
            assert "0.bias" not in decayed
        scheduler.step()


def test_rates_decay_with_depth_from_the_group_that_is_resembled() -> None:
    net = enabled(network(), LoRAAllFineTuningStrategy(rank=1))
    schedule = UnfreezeMilestones((1, 2, 3), num_layers=1, depth_decay=0.5, lr_ratio=1.0)
    schedule.attach(net)
    optimizer = plus(net, optim.AdamW, flipped=False)
    for epoch in range(4):
        schedule.step(epoch, optimizer)
        train(net, optimizer)
    names = {id(p): n for n, p in net.named_parameters()}
    found = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    rated = {n: found[n] for n in ("5.weight", "3.weight", "0.weight", "7.lora_B", "0.lora_B")}
    assert rated == pytest.approx({
        "5.weight": 1e-4, "3.weight": 5e-5, "0.weight": 2.5e-5,
        "7.lora_B": 1.6e-3, "0.lora_B": 1.6e-3,
    })  # fmt: skip


def test_finetune_with_loraplus_unfreezes_at_the_plain_rate() -> None:
    net = network()
    result = finetune(
        net, (X, Y), strategy=LoRAAllFineTuningStrategy(rank=1), schedule=FreezeUnfreeze(1),
        epochs=2, lr=1e-3, loraplus_ratio=16, lr_schedule="constant", warmup=0.0, device="cpu",
        progress=False,
    )  # fmt: skip
    last = result.steps[-1]
    assert {last[k] for k in last if k.startswith("lr")} == {1e-3, 16e-3, 1e-4}


def test_names_of_parameters_in_an_optimizer_follow_them() -> None:
    net, schedule = network(), FreezeUnfreeze(0)
    schedule.attach(net)
    optimizer = optim.SGD(net.named_parameters(), lr=1.0)
    schedule.step(0, optimizer)
    named = dict(net.named_parameters())
    for group in optimizer.param_groups:
        assert all(
            named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True)
        )
    assert [len(g["param_names"]) for g in optimizer.param_groups] == [4, 6]


def test_wrapped_optimizers_and_rates_that_are_tensors() -> None:
    net, schedule = network(), FreezeUnfreeze(1)
    schedule.attach(net)
    inner = optim.AdamW(net.parameters(), lr=torch.tensor(1.0), capturable=False, foreach=False)
    optimizer = accelerate.Accelerator(cpu=True).prepare(inner)
    assert optimizer is not inner
    schedule.step(1, optimizer)
    rate = inner.param_groups[1]["lr"]
    inner.param_groups[0]["lr"].fill_(0.5)
    train(net, optimizer, steps=1)
    assert inner.param_groups[1]["lr"] is rate
    torch.testing.assert_close(rate, torch.tensor(0.05))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda net: optim.LBFGS(net.parameters()), ValueError, "LBFGS takes no groups"),
        (lambda net: optim.SGD([net[0].weight], lr=1.0), ValueError, "no trained parameter of the"),
        (lambda net: net, TypeError, "expected a torch.optim.Optimizer, got Sequential"),
    ],
)
def test_optimizers_that_cannot_be_driven(make: Any, error: type, text: str) -> None:
    """Nothing is unfrozen then."""
    net, schedule = network(), NoFreeze()
    schedule.attach(net)
    with pytest.raises(error, match=text):
        schedule.step(0, make(net))
    assert schedule.trained == []
    assert not net[0].weight.requires_grad


# Learning rates, under every scheduler of torch.

Made = Callable[[optim.Optimizer], LRScheduler]
SCHEDULERS: dict[str, Made] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-3]),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, 20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 2), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} == set(SCHEDULERS)


def step(scheduler: LRScheduler, epoch: int) -> None:
    worse = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(float(epoch)) if worse else scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_keep_their_ratio_under_a_scheduler(name: str) -> None:
    """The head's are those of a run without a schedule, the others theirs times the ratio.

    Rates are looked at where they count: at each step of the optimizer.
    """
    make, plain = SCHEDULERS[name], optim.SGD(network()[7].parameters(), lr=0.1, momentum=0.9)
    net, schedule = network(), UnfreezeMilestones((2, 5), num_layers=1, depth_decay=0.5)
    schedule.attach(net)
    optimizer = optim.SGD(net[7].parameters(), lr=0.1, momentum=0.9)
    scheduler, reference = make(optimizer), make(plain)
    seen: list[list[float]] = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(rates(o)))
    for epoch in range(9):
        schedule.step(epoch, optimizer)
        train(net, optimizer, steps=1)
        plain.step()
        head = rates(plain)[0]
        ratios = [1, *[0.1] * (epoch >= 2), *[0.05, 0.025] * (epoch >= 5)]
        assert seen[-1][0] == head
        assert seen[-1] == pytest.approx([head * ratio for ratio in ratios], rel=1e-12)
        momenta = {group["momentum"] for group in optimizer.param_groups}
        assert momenta == {plain.param_groups[0]["momentum"]}
        step(scheduler, epoch)
        step(reference, epoch)
    assert len({row[0] for row in seen}) > 1, "the scheduler of the test does nothing"


def test_rates_that_are_set_by_hand_keep_their_ratio() -> None:
    net, schedule = network(), FreezeUnfreeze(0, lr_ratio=0.5)
    schedule.attach(net)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    schedule.step(0, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    train(net, optimizer, steps=1)
    assert rates(optimizer) == [0.03, 0.015]


# Resuming.

STRATEGIES: dict[str, FineTuningStrategy | None] = {
    "plain": None,
    "lora": LoRAAllFineTuningStrategy(rank=1),
    "head": HeadReplacementStrategy(3),
}
SCHEDULES: dict[str, tuple[Callable[[], Schedule], str]] = {
    "milestones": (lambda: UnfreezeMilestones((1, 4), num_layers=1, depth_decay=0.5), "adamw"),
    "follow": (lambda: FreezeUnfreeze(2, train_bn=None), "sgd"),
    "still": (lambda: FreezeUnfreeze(4, train_bn=False), "adamw"),
}


def started(strategy: FineTuningStrategy | None, make: Any, schedule: Schedule) -> list[Any]:
    """Network, optimizer and scheduler as at the start of a run."""
    net = network()
    if strategy is not None:
        enable_fine_tuning(net, strategy)
    schedule.attach(net)
    optimizer = make(net.parameters())
    return [net, optimizer, lr_scheduler.OneCycleLR(optimizer, 0.05, 12)]


def run(parts: list[Any], schedule: Schedule, epochs: range) -> None:
    net, optimizer, scheduler = parts
    for epoch in epochs:
        schedule.step(epoch, optimizer)
        train(net.train(), optimizer)
        net.eval()
        scheduler.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("new", "name"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_resumed_run_is_the_uninterrupted_one(
    strategy: str, new: Callable[[], Schedule], name: str, tmp_path: Path
) -> None:
    """Bit for bit: values, states of the optimizer, rates. Interrupted between two milestones."""
    make = Optimizers[name]
    whole = started(STRATEGIES[strategy], make, first := new())
    run(whole, first, range(3))
    torch.save([first.state_dict(), *(part.state_dict() for part in whole)], tmp_path / "saved")
    run(whole, first, range(3, 6))
    torch.manual_seed(7)  # another start, of deltas that are drawn
    resumed = started(STRATEGIES[strategy], make, second := new())
    state, *states = torch.load(tmp_path / "saved", weights_only=True)
    second.load_state_dict(state, resumed[1])
    for part, saved in zip(resumed, states, strict=True):
        part.load_state_dict(saved)
    run(resumed, second, range(3, 6))
    assert same(whole[0], resumed[0])
    assert rates(whole[1]) == rates(resumed[1])
    assert second.trained == first.trained
    one, other = (_flat(part[1].state_dict()["state"]) for part in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def _flat(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    return {f"{n} {k}": torch.as_tensor(v) for n, own in state.items() for k, v in own.items()}


def test_an_optimizer_that_is_made_late_or_anew_gets_all_groups() -> None:
    net, schedule = network(), UnfreezeMilestones((0, 1), num_layers=1)
    schedule.attach(net)
    schedule.step(0)
    schedule.step(1)
    for make in Optimizers.values():
        optimizer = make(net.parameters())
        assert schedule.step(2, optimizer) == []
        assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2, 4]


def test_copies_of_all_together_go_on_as_the_originals() -> None:
    net, schedule = network(), UnfreezeMilestones((0, 2), num_layers=1)
    schedule.attach(net)
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule.step(0, optimizer)
    train(net, optimizer)
    twins = copy.deepcopy((net, schedule, optimizer))
    for parts in ((net, schedule, optimizer), twins):
        for epoch in (1, 2):
            parts[1].step(epoch, parts[2])
            for group in parts[2].param_groups:
                group["lr"] = 0.02
            train(parts[0], parts[2])
    assert same(net, twins[0])
    assert rates(optimizer) == rates(twins[2]) == pytest.approx([0.02, 0.002, 0.002])
    assert not any(p is q for p, q in zip(net.parameters(), twins[0].parameters(), strict=True))
