"""What is fused from adapted layers does not join their network; all else does."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.nn.utils import fusion, parametrizations, weight_norm

import gift
from gift import GiftWarning, enable_fine_tuning
from gift.strategies import (
    DoRAAllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    ModulesFineTuningStrategy,
)
from tests.common import enabled, full_state

timm = pytest.importorskip("timm")
from timm.models import reparameterize_model  # noqa: E402


class Attention(nn.Module):
    """Three projections, or one that is fused from them in one of the usual ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        fused = getattr(self, "qkv", None)
        if fused is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            weight = fused if isinstance(fused, Tensor) else fused.weight
            q, k, v = nn.functional.linear(x, weight, self.biases()).chunk(3, -1)
        return torch.softmax(q @ k.mT, -1) @ v

    def biases(self) -> Tensor:
        return torch.cat([self.q.bias, self.k.bias, self.v.bias])

    def weights(self) -> Tensor:
        return torch.cat([layer.weight.data for layer in (self.q, self.k, self.v)])

    @torch.no_grad()
    def as_diffusers(self) -> None:
        weight = self.weights()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.qkv.weight.copy_(weight)

    def with_gradients(self) -> None:
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        layer = nn.Linear(8, 24, bias=False)
        layer.weight.data = weight
        self.add_module("qkv", layer)

    def as_a_parameter(self) -> None:
        self.qkv = nn.Parameter(self.weights())

    def as_a_registered_parameter(self) -> None:
        self.register_parameter("qkv", nn.Parameter(self.weights(), requires_grad=False))

    def by_a_helper(self) -> None:
        layer = nn.Linear(8, 24, bias=False)
        with torch.no_grad():
            torch.cat([self.q.weight, self.k.weight, self.v.weight], out=layer.weight.data)
        self.qkv = layer


class OwnAttribute(Attention):
    """Sets attributes by a method of its own, as some authors do."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)


FUSIONS: list[Callable[[Any], None]] = [
    Attention.as_diffusers,
    Attention.with_gradients,
    Attention.as_a_parameter,
    Attention.as_a_registered_parameter,
    Attention.by_a_helper,
]


@pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, DoRAAllFineTuningStrategy])
@pytest.mark.parametrize("fuse", FUSIONS, ids=lambda fuse: fuse.__name__)
def test_a_fused_layer_does_not_join(fuse: Callable[[Any], None], strategy: Any) -> None:
    net = enabled(nn.Sequential(Attention(), nn.Linear(8, 2)), strategy(rank=2))
    x = torch.randn(2, 5, 8)
    before, expected = full_state(net), net(x)
    with pytest.raises(RuntimeError, match=r"Linear.weight is adapted.*gift.merge\(network\)"):
        fuse(net[0])
    assert full_state(net) == before
    with gift.merged(net):
        fuse(net[0])
        torch.testing.assert_close(net(x), expected)
    assert full_state(net) == before
    assert torch.equal(net(x), expected)
    fuse(gift.merge(net)[0])
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("fuse", FUSIONS, ids=lambda fuse: fuse.__name__)
def test_neither_by_a_setter_of_its_own(fuse: Callable[[Any], None]) -> None:
    net = enabled(nn.Sequential(OwnAttribute(), nn.Linear(8, 2)))
    with pytest.raises(RuntimeError, match=r"Linear\.weight is adapted"):
        fuse(net[0])


@pytest.mark.parametrize("fuse", FUSIONS, ids=lambda fuse: fuse.__name__)
def test_what_is_fused_while_disabled_is_named(fuse: Callable[[Any], None]) -> None:
    net = enabled(nn.Sequential(Attention(), nn.Linear(8, 2)))
    named = pytest.warns(GiftWarning, match=r"0\.qkv.* joined .*gift\.merged\(network\)")
    with named, gift.disabled(net):
        fuse(net[0])
    assert all(p.requires_grad for p in net.parameters())  # the deltas are back


def replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight + 1)


def shrunk(layer: Any) -> None:
    layer.bias = None


HARMLESS = [replaced, shrunk, weight_norm, parametrizations.weight_norm, lambda layer: layer]


@pytest.mark.parametrize("change", HARMLESS)
def test_other_changes_while_disabled_are_not(change: Callable[[Any], Any]) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    enable_fine_tuning(net, ModulesFineTuningStrategy("1"))
    with warnings.catch_warnings(action="error", category=GiftWarning), gift.disabled(net):
        change(net[0])


def conv_and_norm() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def fused_weights(conv: Any, norm: Any) -> Any:
    """A new layer, as many libraries make it."""
    weight, bias = fusion.fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    made = nn.Conv2d(3, 4, 3).requires_grad_(False)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made


def into_a_new_layer(net: Any) -> Any:
    net[0], net[1] = fused_weights(net[0], net[1]), nn.Identity()
    return net


def test_a_norm_that_is_folded_in() -> None:
    net, x = enabled(conv_and_norm()).eval(), torch.randn(2, 3, 6, 6)
    before, expected = full_state(net), net(x)
    with pytest.raises(RuntimeError, match=r"Conv2d.weight is adapted.*gift.merge\(network\)"):
        into_a_new_layer(net)
    assert full_state(net) == before
    with gift.merged(net):
        torch.testing.assert_close(into_a_new_layer(net)(x), expected)
    assert full_state(net) == before
    torch.testing.assert_close(into_a_new_layer(gift.merge(net))(x), expected)


def two_factors(net: Any) -> None:
    """As those who make a layer smaller."""
    u, sizes, v = torch.linalg.svd(net[0].weight.detach())
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(4, 8)
    with torch.no_grad():
        first.weight.copy_(v[:4])
        second.weight.copy_(u[:, :4] * sizes[:4])
    net[0] = nn.Sequential(first, second)


def some_rows(net: Any) -> None:
    made = nn.Linear(8, 4)
    made.weight.data = net[0].weight.data[:4] * 1
    net.set_submodule("0", made)


def by_numpy(net: Any) -> None:
    made = nn.Linear(8, 8)
    made.weight.data = torch.from_numpy(net[0].weight.detach().numpy() * 2)
    net[0] = made


def by_its_state(net: Any) -> None:
    made = nn.Linear(8, 8)
    made.load_state_dict({"weight": net[0].weight, "bias": net[0].bias})
    net[0] = made


@pytest.mark.parametrize("surgery", [two_factors, some_rows, by_numpy, by_its_state])
def test_a_layer_that_is_made_from_an_adapted_one(surgery: Callable[[Any], None]) -> None:
    net, x = enabled(nn.Sequential(nn.Linear(8, 8))), torch.randn(3, 8)
    expected, before = net(x), full_state(net)
    with pytest.raises(RuntimeError, match=r"Linear.weight is adapted.*gift.merge\(network\)"):
        surgery(net)
    assert full_state(net) == before
    assert torch.equal(net(x), expected)
    surgery(gift.merge(net))


MODELS = ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_050", "levit_128s"]


@pytest.mark.parametrize("name", MODELS)
def test_models_that_merge_their_branches(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).eval()
    x = torch.rand(1, 3, *(2 * [224 if "levit" in name else 64]))
    enabled(net, LoRAAllFineTuningStrategy(rank=1), std=0.01)
    expected, before = net(x), full_state(net)
    with pytest.raises(RuntimeError, match=r"is adapted.*gift.merge\(network\)"):
        reparameterize_model(net, inplace=True)
    assert full_state(net) == before
    assert torch.equal(net(x), expected)
    with gift.merged(net):
        fused = reparameterize_model(net)
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(net(x), expected)
    fused = reparameterize_model(gift.merge(net))
    torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3)


# --- what joins ----------------------------------------------------------------------------------


def tuned() -> Any:
    return enabled(nn.Sequential(Attention(), nn.Linear(8, 2)))


def joins(net: Any, layer: nn.Module) -> None:
    net.more = layer
    assert net.more is layer
    assert {id(p) for p in layer.parameters()} <= {id(p) for p in net.parameters()}


def test_a_layer_that_was_made_of_nothing() -> None:
    joins(tuned(), nn.Linear(8, 8))


def test_a_layer_after_a_look_at_weights() -> None:
    net = tuned()
    shape, norm, rows = net[1].weight.shape, net[1].weight.norm(), net[1].weight.norm(dim=1)
    mask = net[1].weight > 0
    dtype, device = net[1].weight.data.dtype, net[1].weight.data.device
    assert norm > 0
    assert len(rows) == len(mask) == 2
    joins(net, nn.Linear(shape[1], 4, dtype=dtype, device=device))


def copied(net: Any) -> Tensor:
    return net[1].weight.detach().clone()


def test_a_layer_from_a_function_that_copied_nothing() -> None:
    net = tuned()
    assert len(copied(net)) == 2

    def add() -> None:
        joins(net, nn.Linear(8, 8))

    add()


def test_a_layer_after_the_network_was_called() -> None:
    net = tuned()
    held = copied(net)
    net(torch.randn(2, 5, 8))
    joins(net, nn.Linear(8, 8))
    assert torch.equal(copied(net), held)


def test_a_layer_in_another_network() -> None:
    net, other = tuned(), nn.Sequential(nn.Linear(8, 2))
    weight = copied(net)
    other[0] = nn.Linear(8, 2)
    other[0].weight.data.copy_(weight)
    assert torch.equal(other[0].weight, net[1].weight)


def test_wrappers_of_layers() -> None:
    net, x = tuned(), torch.randn(2, 5, 8)
    expected, weight = net(x), copied(net)
    net[1] = wrappers.checkpoint_wrapper(net[1])
    assert torch.equal(net(x), expected)
    assert len(weight) == 2


def test_layers_without_parameters_and_buffers() -> None:
    net = tuned()
    weight = copied(net)
    net.register_buffer("start", weight)
    net[0] = nn.Identity()
    assert net.start is weight


def test_another_delta_of_a_bank(tmp_path: Path) -> None:
    """Tensors that gift itself registers."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    gift.save(net, tmp_path / "a.safetensors")
    bank = gift.DeltaBank(gift.disable_fine_tuning(net))
    bank.add("a", tmp_path / "a.safetensors")
    bank.activate("a")
    held = copied(net)
    bank.add("b", strategy=DoRAAllFineTuningStrategy(rank=1))
    bank.activate("b")
    assert torch.equal(copied(net), held)


def test_copies_of_a_network_are_held_as_well() -> None:
    net = copy.deepcopy(tuned())
    with pytest.raises(RuntimeError, match="is about to join"):
        net[0].as_diffusers()
