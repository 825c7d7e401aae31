"""Parameters that all layers share: one object under several names, wherever a network goes."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gift
from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, mc_name
from gift.strategies import FacTAllFineTuningStrategy, TinyLoRAAllFineTuningStrategy
from tests.common import all_bits

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 6))


def network() -> nn.Sequential:
    net = base()
    enable_fine_tuning(net, FacTAllFineTuningStrategy(rank=3))
    return moved(net)


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def assert_shares(net: nn.Module) -> None:
    assert net[0].fact_U is net[2].fact_U is not net[3].fact_U
    assert net[0].fact_V is net[2].fact_V is net[3].fact_V
    assert net[0].fact_S is not net[2].fact_S


def test_they_are_given_once_and_get_the_gradients_of_all_layers() -> None:
    net = network()
    assert_shares(net)
    sizes = 3 * 9 + 12 * 3 + 6 * 3 + 3 * 12
    assert sum(p.numel() for p in net.parameters()) == sizes
    net(X).square().sum().backward()
    whole = net[0].fact_V.grad.clone()
    parts = []
    for layer in (net[0], net[2], net[3]):
        leaf = net[0].fact_V.detach().clone().requires_grad_()

        def output(
            one: nn.Module, x: Tensor, layer: nn.Module = layer, leaf: Tensor = leaf
        ) -> Tensor:
            for part in one:
                if isinstance(part, nn.Linear):
                    v = leaf if part is layer else part.fact_V.detach()
                    frozen = part._parameters["weight"]
                    x = x @ (frozen + part.fact_U @ part.fact_S @ v).T + part.bias
                else:
                    x = part(x)
            return x

        output(net, X).square().sum().backward()
        parts.append(leaf.grad)
    torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_casts_share_their_own() -> None:
    net = network()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_shares(other)
        assert other[0].fact_U is not net[0].fact_U
        assert torch.equal(other(X), net(X))
    assert_shares(net.double())
    assert_shares(net.bfloat16())


def test_states_and_files(tmp_path: Path) -> None:
    """A state has them under each name and in one memory; a file has them once."""
    net = network()
    state = net.state_dict()
    assert state["0.fact_V"].data_ptr() == state["3.fact_V"].data_ptr()
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    for assign in (False, True):
        other = base()
        enable_fine_tuning(other, FacTAllFineTuningStrategy(rank=3))
        other.load_state_dict(torch.load(stored, weights_only=True), assign=assign)
        stored.seek(0)
        assert_shares(other)
        assert torch.equal(other(X), net(X))
    gift.save(net, tmp_path / "delta.safetensors")
    assert gift.inspect(tmp_path / "delta.safetensors").parameters == 27 + 36 + 18 + 36
    fresh = base()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert_shares(fresh)
    assert torch.equal(fresh(X), net(X))


def test_switched_off_merged_and_disabled() -> None:
    net = network()
    output = net(X)
    with gift.disabled(net):
        assert torch.equal(net(X), base()(X))
    assert_shares(net)
    assert torch.equal(net(X), output)
    merged = copy.deepcopy(net)
    gift.merge(merged)
    torch.testing.assert_close(merged(X), output)
    assert all_bits(disable_fine_tuning(net)) == all_bits(base())


def test_values_for_one_call_replace_all() -> None:
    net = network()
    other = {name: p.detach() + 0.1 for name, p in net.named_parameters() if p.requires_grad}
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.add_(0.1)
    assert torch.equal(functional_call(net, other, (X,)), expected(X))
    assert_shares(net)


def test_a_second_strategy_has_its_own() -> None:
    """On top of the first one, and for another part of the network."""
    net = network()
    lower = net[0].fact_V
    enable_fine_tuning(net, FacTAllFineTuningStrategy(rank=3), stack=True)
    assert net[0].fact_V is lower
    assert net[0].fact_V_2 is net[3].fact_V_2 is not lower
    caps = [(mc_name("0") | mc_name("2"), ma_adapt("tinylora")), (mc_name("3"), ma_adapt("lora"))]
    other = base()
    enable_fine_tuning(other, FineTuningStrategy(caps))
    assert other[0].tiny_v is other[2].tiny_v


def test_a_network_trains_by_a_few_numbers() -> None:
    net = base()
    enable_fine_tuning(net, TinyLoRAAllFineTuningStrategy(rank=4, u=7))
    assert sum(p.numel() for p in net.parameters()) == 7
    target = moved(copy.deepcopy(net))(X).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (net(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
