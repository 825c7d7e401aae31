"""What is done to a network while it is the base for a while: right afterwards, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import gift
from gift import DeltaBank
from gift.strategies import (
    BitFitFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    PiSSAAllFineTuningStrategy,
)
from tests.common import enabled, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning", "ignore::FutureWarning")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


def network() -> Any:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def halved(layer: nn.Module, name: str) -> None:
    prune.custom_from_mask(layer, name, torch.arange(getattr(layer, name).numel())
                           .view_as(getattr(layer, name)) % 2)  # fmt: skip


Compute = Callable[[Any], Any]
COMPUTES: dict[str, Compute] = {
    "weight": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "pruned": lambda layer: halved(layer, "weight"),
    "pruned bias": lambda layer: halved(layer, "bias"),
}


def formula(net: Any, base: Any) -> Tensor:
    """What the base gives with ``B A`` on its two weights, whatever computes these."""
    hidden = base[0](X) + X @ (net[0].lora_B @ net[0].lora_A).T
    hidden = torch.tanh(hidden)
    return base[2](hidden) + hidden @ (net[2].lora_B @ net[2].lora_A).T


@pytest.mark.parametrize("name", COMPUTES)
def test_a_tensor_that_is_computed_since_has_its_delta_on_top(name: str) -> None:
    net, base = enabled(network()).eval(), network().eval()
    with gift.disabled(net):
        torch.manual_seed(4)
        COMPUTES[name](net[0])
        expected = net(X).detach()
    torch.manual_seed(4)
    COMPUTES[name](base[0])
    torch.testing.assert_close(net(X), formula(net, base))
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.lora_{k}" for i in (0, 2) for k in "AB"}
    net(X).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == trained
    with gift.disabled(net):
        torch.testing.assert_close(net(X), expected)
    with gift.merged(copy.deepcopy(net)) as merged:
        torch.testing.assert_close(merged(X), formula(net, base))
    gift.disable_fine_tuning(net)
    torch.testing.assert_close(net(X), expected)
    assert all(p.requires_grad for p in net[2].parameters())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrization_that_is_removed_meanwhile(name: str) -> None:
    net = network()
    COMPUTES[name](net[0])
    enabled(net)
    with gift.disabled(net):
        parametrize.remove_parametrizations(net[0], name)
        base = copy.deepcopy(net)
    torch.testing.assert_close(net(X), formula(net, base))
    gift.disable_fine_tuning(net)
    assert torch.equal(net(X), base(X))


@pytest.mark.parametrize("name", ["weight", "pruned"])
def test_a_base_of_many_deltas_that_is_computed_since(name: str) -> None:
    net, base = enabled(network()).eval(), network().eval()
    bank = DeltaBank(net)
    bank.add("a")
    bank.activate(None)
    for one in (net, base):
        COMPUTES[name](one[0])
    bank.activate("a")
    torch.testing.assert_close(net(X), formula(net, base))


def test_a_method_that_was_made_from_the_weight_stays_what_it_is() -> None:
    """PiSSA's delta is ``B A - B0 A0``, added to whatever the weight is now."""
    net = network()
    gift.enable_fine_tuning(net, PiSSAAllFineTuningStrategy(rank=1))
    with torch.no_grad():
        net[0].lora_A.mul_(2)
    change = net[0].weight.detach() - network()[0].weight.detach()
    with gift.disabled(net):
        COMPUTES["weight"](net[0])
    torch.testing.assert_close(net[0].weight, 2 * network()[0].weight + change)


def test_what_is_trained_in_place_is_not_computed_meanwhile() -> None:
    net = network()
    bank = DeltaBank(net)
    bank.add("a", strategy=BitFitFineTuningStrategy())
    COMPUTES["bias"](net[0])
    before = full_state(net)
    with pytest.raises(RuntimeError, match=r"\['0'\] were parametrised"):
        bank.activate("a")
    assert full_state(net) == before
    parametrize.remove_parametrizations(net[0], "bias")
    bank.activate("a")


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = enabled(network()), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


@pytest.mark.parametrize("within", [gift.disabled, gift.merged])
def test_an_outer_network_is_not_fine_tuned_while_an_inner_one_is_the_base(within: Any) -> None:
    net = Outer()
    expected = net(X)
    with within(net.inner):
        before = full_state(net)
        with pytest.raises(RuntimeError, match=r"inner(\.0)? is temporarily (disabled|merged)"):
            gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy())
        assert full_state(net) == before
    assert torch.equal(net(X), expected)


def test_a_bank_does_not_switch_a_part_that_an_outer_network_adapts() -> None:
    net = Outer()
    bank = DeltaBank(net.inner)
    bank.add("a")
    bank.activate(None)
    enabled(net)
    before, expected = full_state(net), net(X)
    with pytest.raises(RuntimeError, match="0, 2 are being fine-tuned by another strategy"):
        bank.activate("a")
    assert (full_state(net), bank.active) == (before, None)
    assert torch.equal(net(X), expected)


def for_a_while(net: Any) -> None:
    with gift.disabled(net):
        pass


@pytest.mark.parametrize("act", [gift.disable_fine_tuning, gift.merge, DeltaBank, for_a_while])
def test_the_bias_of_an_adapted_layer_is_computed(act: Any) -> None:
    """It computes; what takes the deltas off is refused, until the parametrization is removed."""
    net, base = enabled(network()), network()
    for one in (net, base):
        COMPUTES["bias"](one[0])
    torch.testing.assert_close(net(X), formula(net, base))
    before = full_state(net)
    with pytest.raises(RuntimeError, match=r"the class of \['0'\] was changed since"):
        act(net)
    assert full_state(net) == before
    parametrize.remove_parametrizations(net[0], "bias", leave_parametrized=False)
    act(net)
