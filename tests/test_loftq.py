"""LoftQ, beside a loop of the paper that is written with the packages of quantisation alone."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy
from gift.factories import ma_adapt, mc_layer, mc_name, mc_path
from gift.starts import loftq
from tests.common import all_bits, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


def plain(*sizes: int) -> Any:
    torch.manual_seed(0)
    sizes = sizes or (64, 96, 64)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers)


def to_nf4(net: nn.Module) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, layer in list(net.named_children()):
        packed = bitsandbytes.nn.LinearNF4(layer.in_features, layer.out_features)
        packed.load_state_dict(layer.state_dict())
        setattr(net, name, packed.to("cpu"))
    return net


def to_int8(net: nn.Module) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    return net


def nf4(weight: Tensor) -> Tensor:
    """What 4 bits keep of a matrix."""
    functional = pytest.importorskip("bitsandbytes").functional
    data, state = functional.quantize_4bit(
        weight.float(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(data, state).double()


def int8(weight: Tensor) -> Tensor:
    """What 8 bits keep of a matrix."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return to_int8(nn.Sequential(layer))[0].weight.dequantize().detach().double()


KINDS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Tensor], Tensor]]] = {
    "nf4": (to_nf4, nf4),
    "int8": (to_int8, int8),
}


def by_the_paper(
    weight: Tensor, quantise: Callable[[Tensor], Tensor], rank: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """The quantised matrix and the product of the factors after these rounds."""
    weight = weight.double()
    product = torch.zeros_like(weight)
    for _ in range(rounds):
        base = quantise(weight - product)
        u, sigma, vh = torch.linalg.svd(weight - base)
        product = u[:, :rank] @ torch.diag(sigma[:rank]) @ vh[:rank]
    return base, product


def tuned(net: Any, method: str = "lora", check: Any = None, **settings: Any) -> Any:
    cap = mc_layer() if check is None else check, ma_adapt(method, **{"rank": 4} | settings)
    gift.enable_fine_tuning(net, FineTuningStrategy([cap]))
    return net


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}), ("lora", {"lora_alpha": -6.0}), ("rslora", {"lora_alpha": 3.0}), ("lora_fa", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rounds_of_the_paper(kind: str, rounds: int, method: str, settings: Any) -> None:
    to_kind, quantise = KINDS[kind]
    original = plain()
    net = tuned(to_kind(copy.deepcopy(original)), method, **settings)
    report = loftq(net, original, rounds)
    for name in ("0", "1"):
        weight, layer = original.get_submodule(name).weight.detach(), net.get_submodule(name)
        base, product = by_the_paper(weight, quantise, 4, rounds)
        torch.testing.assert_close(layer.weight.double(), base + product, rtol=1e-4, atol=1e-5)
        with gift.disabled(net):
            held = gift.quantization.dequantised(layer._parameters["weight"], layer).double()
        torch.testing.assert_close(held, base, rtol=1e-6, atol=1e-6)
        error = (weight - quantise(weight)).square().sum()
        share = 1 - (weight - base - product).square().sum() / error
        assert report.shares[f"{name}.weight"] == pytest.approx(float(share), abs=1e-4)
    assert report.left == []


def test_it_is_near_the_original_network_and_learns() -> None:
    """Nearer than the quantised one, its weights still nearer by more rounds; a reload needs no
    original.
    """
    original, x = plain(), torch.randn(8, 64)
    base = to_nf4(copy.deepcopy(original))
    outputs, weights = [], []
    for rounds in (0, 1, 5):
        net = copy.deepcopy(base)
        if rounds:
            loftq(tuned(net, rank=16), original.state_dict(), rounds)
        outputs.append(float((net(x) - original(x)).norm()))
        errors = [
            gift.quantization.dequantised(layer.weight, layer) - plain_layer.weight
            for layer, plain_layer in zip(net, original, strict=True)
        ]
        weights.append(float(torch.cat([error.flatten() for error in errors]).norm()))
    assert max(outputs[1:]) < 0.9 * outputs[0]
    assert weights[2] < weights[1] < 0.9 * weights[0]
    net(x).square().sum().backward()
    assert net[0].lora_A.grad.any()
    assert net[0].lora_B.grad.any()
    state = net.state_dict()
    again = copy.deepcopy(net)
    gift.disable_fine_tuning(again)
    tuned(again, rank=16)
    again.load_state_dict(state)
    assert torch.equal(again(x), net(x))


def test_one_round_leaves_the_base_as_it_is() -> None:
    original = plain()
    net = tuned(to_nf4(copy.deepcopy(original)))
    bits = all_bits(net)
    loftq(net, original)
    changed = {name for name, value in all_bits(net).items() if value != bits[name]}
    assert changed == {f"{i}.lora_{factor}" for i in (0, 1) for factor in "AB"}


def test_what_is_not_quantised_keeps_its_start() -> None:
    original = plain(64, 64, 64, 32)
    net = copy.deepcopy(original)
    net[0] = to_nf4(nn.Sequential(net[0]))[0]
    net[2] = to_nf4(nn.Sequential(net[2]))[0]
    caps = [(mc_path("2"), ma_adapt("dora", rank=2)), (mc_layer(), ma_adapt("lora", rank=2))]
    gift.enable_fine_tuning(net, FineTuningStrategy(caps))
    report = loftq(net, original)
    assert list(report.shares) == ["0.weight"]
    assert report.left == ["1.weight", "2.weight"]
    assert not net[1].lora_B.any()


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    original = plain(64, 96, 64, 64)
    net = tuned(to_nf4(copy.deepcopy(original)))
    before = full_state(net)
    state = original.state_dict()
    del state["0.weight"]
    state["1.weight"] = torch.zeros(3, 3)
    state["2.weight"] = torch.full((64, 64), torch.nan)
    message = r"(?s)0.weight: the original.*1.weight: it is \(3, 3\).*2.weight: it is not finite"
    with pytest.raises(gift.AdaptationError, match=message):
        loftq(net, state)
    assert full_state(net) == before
    with pytest.raises(gift.AdaptationError, match="quantised in the original network too"):
        loftq(net, to_nf4(copy.deepcopy(original)))
    with pytest.raises(ValueError, match="rounds is 0"):
        loftq(net, original, 0)
    with pytest.raises(RuntimeError, match="the original network is being fine-tuned"):
        loftq(net, net)
    with pytest.raises(gift.AdaptationError, match="loftq starts quantised weights"):
        loftq(tuned(copy.deepcopy(original)), original)
    zero = tuned(to_nf4(copy.deepcopy(original)), lora_alpha=0, check=mc_name("0"))
    with pytest.raises(gift.AdaptationError, match="its scaling is 0"):
        loftq(zero, original)
