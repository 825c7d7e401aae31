"""Methods whose parameters act on a bias too: what the matrix does not go through."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gift
from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, mc_name, pa_adapt, pc_path
from gift.strategies import GLoRAAllFineTuningStrategy, SSFAllFineTuningStrategy
from tests.cases.methods import generalised, generalised_bias
from tests.common import all_bits

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def test_a_layer_without_bias_and_a_weight_alone_have_no_parameters_for_one() -> None:
    net = network()
    enable_fine_tuning(net, SSFAllFineTuningStrategy())
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "0.ssf_gamma", "0.ssf_beta", "2.ssf_gamma",
    ]  # fmt: skip
    net = network()
    caps = FineTuningStrategy(para_caps=[(pc_path("0.weight"), pa_adapt("glora"))])
    enable_fine_tuning(net, caps)
    assert not any("glora_C" in name or "glora_E" in name for name, _ in net.named_parameters())


def test_merged_saved_and_disabled(tmp_path: Path) -> None:
    base, x = network(), torch.randn(5, 6)
    net = network()
    enable_fine_tuning(net, GLoRAAllFineTuningStrategy(rank=2))
    moved(net)
    output = net(x)
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = network()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh(x), output)
    with gift.disabled(net):
        assert torch.equal(net(x), base(x))
    gift.merge(fresh)
    assert type(fresh[0]) is nn.Linear
    torch.testing.assert_close(fresh(x), output)
    assert all_bits(disable_fine_tuning(net)) == all_bits(base)


def test_a_bias_on_top_of_another_sees_the_weight_under_it() -> None:
    """The upper GLoRA mixes the weight that the lower SSF scales."""
    net = network().double()
    layer = net[0]
    w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    enable_fine_tuning(net, SSFAllFineTuningStrategy())
    moved(net)
    gamma, beta = layer.ssf_gamma.detach(), layer.ssf_beta.detach()
    enable_fine_tuning(net, FineTuningStrategy([(mc_name("0"), ma_adapt("glora"))]), stack=True)
    moved(net)
    lower, shift = gamma * w, gamma * b[:, None] + beta
    own = {n: p.detach() for n, p in layer.named_parameters(recurse=False) if "glora" in n}
    torch.testing.assert_close(layer.weight, generalised(lower, own))
    torch.testing.assert_close(layer.bias, generalised_bias(shift, own, lower)[:, 0])


def test_a_tied_weight_leaves_the_biases_of_other_weights_their_deltas() -> None:
    """Both layers read one input weight; each has a recurrent weight of its own."""
    net = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.LSTM(4, 4)})
    net.b.weight_ih_l0 = net.a.weight_ih_l0
    enable_fine_tuning(net, SSFAllFineTuningStrategy())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)
    for layer, name in ((net.a, "bias_ih_l0"), (net.a, "bias_hh_l0"), (net.b, "bias_hh_l0")):
        frozen = dict(nn.Module.named_parameters(layer))
        assert not torch.equal(getattr(layer, name), frozen[name]), name
