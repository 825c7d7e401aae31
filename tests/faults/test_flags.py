"""Whoever switches what in which order: the base is never trained, and has its own flags.

A model of what must hold: the flags of the base are those that somebody gave it while it was the
base, and an optimizer that has everything moves what the network that is active has chosen, alone.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import DeltaBank
from gift.errors import AdaptationError
from gift.strategies import (
    BitFitFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    NormFineTuningStrategy,
)

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Trial:
    """A network and its bank, with the flags and values that its base must have."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.net: Any = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
        for parameter in self.net.parameters():
            parameter.requires_grad = self.random.random() < 0.7
        self.base: dict[str, Tensor] = dict(self.net.named_parameters())
        self.flags = {name: p.requires_grad for name, p in self.base.items()}
        self.values = {name: p.detach().clone() for name, p in self.base.items()}
        self.bank = DeltaBank(self.net)
        self.done: list[str] = []

    @property
    def active(self) -> bool:
        return "_gift_network" in vars(self.net)

    def strategy(self) -> gift.FineTuningStrategy:
        lora = LoRAAllFineTuningStrategy(rank=1)
        kinds = [lora, NormFineTuningStrategy(), BitFitFineTuningStrategy(),
                 HeadReplacementStrategy(2, "3"),
                 gift.merge_strategies([lora, NormFineTuningStrategy()])]  # fmt: skip
        return self.random.choice(kinds)

    def name(self) -> str | None:
        return self.random.choice([*self.bank.names, None])

    def do(self, operation: str) -> None:
        """Do it, where it can be done now, and see what the base is."""
        self.done.append(operation)
        try:
            OPERATIONS[operation](self)
        except (AdaptationError, ValueError):  # refused
            self.done[-1] += " (refused)"
        if not self.active:
            assert {n: p.requires_grad for n, p in self.base.items()} == self.flags, self.done
            assert all(torch.equal(p, self.values[n]) for n, p in self.base.items()), self.done
        else:
            self.train()

    def train(self) -> None:
        """A step of an optimizer that has all parameters, of the base too."""
        named = dict(nn.Module.named_parameters(self.net, remove_duplicate=False))
        optimizer = torch.optim.SGD({id(p): p for p in named.values()}.values(), lr=0.1)
        before = {name: p.detach().clone() for name, p in self.base.items()}
        chosen = {id(named[name]) for name in self.net._gift_network.chosen}
        output = self.net(X)
        if output.requires_grad:
            output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, p in self.base.items() if not torch.equal(p, before[n])}
        assert moved <= {n for n, p in self.base.items() if id(p) in chosen}, self.done

    def fresh(self) -> None:
        name = f"n{len(self.done)}"
        self.bank.add(name, strategy=self.strategy())

    def enable(self) -> None:
        if not self.active:
            gift.enable_fine_tuning(self.net, self.strategy())
            self.bank.add(f"n{len(self.done)}")

    def activate(self) -> None:
        self.bank.activate(self.name())

    def deactivate(self) -> None:
        self.bank.activate(None)

    def remove(self) -> None:
        if self.bank.names:
            self.bank.remove(self.random.choice(self.bank.names))

    def scale(self) -> None:
        if self.bank.names:
            self.bank.scale(self.random.choice(self.bank.names), 2.0)

    def rows(self) -> None:
        with self.bank.rows([self.name() for _ in range(3)]):
            self.net(X)

    def merged(self) -> None:
        if self.active:
            with gift.merged(self.net):
                assert not any(p.requires_grad for p in nn.Module.parameters(self.net))

    def disabled(self) -> None:
        if self.active:
            with gift.disabled(self.net):
                assert not any(p.requires_grad for p in nn.Module.parameters(self.net))

    def set_flags(self) -> None:
        """Of the base somebody sets flags; of a network that is active they are held."""
        flag = self.random.random() < 0.5
        self.net.requires_grad_(flag)
        if not self.active:
            self.flags = dict.fromkeys(self.flags, flag)

    def set_flag(self) -> None:
        if not self.active:
            name = self.random.choice(list(self.base))
            self.base[name].requires_grad ^= True
            self.flags[name] ^= True


OPERATIONS: dict[str, Callable[[Trial], None]] = {
    name: getattr(Trial, name)
    for name in ("fresh", "enable", "activate", "deactivate", "remove", "scale", "rows", "merged",
                 "disabled", "set_flags", "set_flag")
}  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_twenty_five_operations_at_random(seed: int) -> None:
    trial = Trial(seed)
    for _ in range(25):
        trial.do(trial.random.choice(list(OPERATIONS)))


def test_two_deltas_are_switched_in_every_order() -> None:
    for order in itertools.permutations(["activate", "deactivate", "merged", "disabled", "rows"]):
        trial = Trial(7)
        for operation in ("enable", "fresh", *order, "set_flags", *order, "deactivate"):
            trial.do(operation)


def test_disabling_gives_back_a_flag_that_was_set_meanwhile() -> None:
    """Also of what is trained in place, which fine-tuning had not frozen."""
    net = nn.Linear(3, 3)
    gift.enable_fine_tuning(net, BitFitFineTuningStrategy())
    net.requires_grad_(False)
    gift.disable_fine_tuning(net)
    assert net.weight.requires_grad
    assert net.bias.requires_grad
