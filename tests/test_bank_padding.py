"""A bank whose deltas have one form: they compute what they did, and nothing is compiled again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import gift
from gift import DeltaBank, FineTuningStrategy
from gift.factories import ma_adapt, ma_bottleneck, mc_layer, mc_path, pa_train, pc_path
from tests.common import all_bits, full_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.usefixtures("dynamo"),
]
X = torch.randn(6, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 12), nn.LayerNorm(12),
        nn.Linear(12, 5),
    ).double().eval()  # fmt: skip


def everywhere(method: str = "lora", **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))])


def at(*paths: str, method: str = "lora", **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_path(*paths), ma_adapt(method, **settings))])


STRATEGIES = {
    "small": everywhere(rank=1),
    "scaled": everywhere(rank=2, lora_alpha=3.0),
    "one layer": at("3", method="rslora", rank=4, lora_alpha=5.0),
    "others": at("0", "5", method="pissa", rank=1),
    "products": at("5", method="loha", rank=2),
    "weight itself": FineTuningStrategy(
        [(mc_path("0"), ma_adapt("lora", rank=1))], [(pc_path("5.weight"), pa_train())]
    ),
    "norm": FineTuningStrategy(
        [(mc_path("3"), ma_adapt("lora", rank=2))], [(pc_path("4.weight"), pa_train())]
    ),
}


def filled(net: Any, strategies: dict[str, FineTuningStrategy]) -> tuple[DeltaBank, dict[str, Any]]:
    """A bank with these deltas, as after some training, and what the network gives with each."""
    bank, outputs = DeltaBank(net), {}
    for name, strategy in strategies.items():
        bank.add(name, strategy=strategy)
        bank.activate(name)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            outputs[name] = net(X)
    bank.activate(None)
    with torch.no_grad():
        base = net(X)
    assert not any(torch.allclose(output, base, atol=1e-2) for output in outputs.values())
    return bank, outputs


def compiled_frames(net: Any, bank: DeltaBank, expected: dict[str, Tensor]) -> int:
    """How often the network was compiled for all deltas, each twice."""
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter)
    with torch.no_grad():
        for name in [*expected, *expected]:
            bank.activate(name)
            torch.testing.assert_close(compiled(X), expected[name], rtol=1e-10, atol=1e-10)
    return counter.frame_count


def test_switching_compiles_once() -> None:
    net = network()
    bank, outputs = filled(net, STRATEGIES)
    bits = all_bits(net)
    assert compiled_frames(net, bank, outputs) > 1, "the deltas of the test are alike"
    torch._dynamo.reset()
    bank.pad()
    assert compiled_frames(net, bank, outputs) == 1
    bank.activate(None)
    assert all_bits(net) == bits


def test_a_later_delta_fits_too() -> None:
    """With a rank that is enough for it; calls with different rows compile nothing either."""
    net = network()
    bank, outputs = filled(net, {"one": everywhere(rank=1), "two": everywhere(rank=3)})
    bank.pad(rank=4)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter)
    bank.activate("one")
    with torch.no_grad():
        compiled(X)
    bank.activate(None)
    more, later = filled(copy.deepcopy(net), {"three": at("3", rank=4, lora_alpha=9.0)})
    more.activate("three")
    gift_state = more.net.state_dict()
    bank.add("three", gift_state, strategy=at("3", rank=4, lora_alpha=9.0))
    bank.pad(rank=4)
    with torch.no_grad():
        for name, expected in (outputs | later).items():
            bank.activate(name)
            torch.testing.assert_close(compiled(X), expected, rtol=1e-10, atol=1e-10)
            assert net[3].lora_A.shape == (4, 216)
        names = ["one", "two", "three", "three", "two", "one"]
        with bank.rows(names):
            rows = net(X)
        bank.activate("two")
        compiled(X)
    for i, name in enumerate(names):
        torch.testing.assert_close(rows[i], (outputs | later)[name][i])
    assert counter.frame_count == 1


def test_padded_deltas_learn_what_they_did() -> None:
    """The added zeros get no gradient, and the same steps give the same outputs."""
    ends = []
    for pads in (False, True):
        net = network()
        bank, _ = filled(net, {"one": everywhere(rank=2), "two": everywhere(rank=5)})
        if pads:
            bank.pad()
        bank.activate("one")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            net(X).square().sum().backward()
            optimizer.step()
        ends.append(net(X).detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)
    assert net[3].lora_A.shape == (5, 216)
    assert not net[3].lora_A[2:].any()
    assert not net[3].lora_B[:, 2:].any()


def test_an_active_delta_stays_active_and_files_hold_padded_ones(tmp_path: Any) -> None:
    net = network()
    bank, outputs = filled(net, {"one": at("3", rank=1), "two": everywhere(rank=3)})
    bank.activate("one")
    bank.pad()
    assert bank.active == "one"
    with torch.no_grad():
        torch.testing.assert_close(net(X), outputs["one"])
    gift.save(net, tmp_path / "one.safetensors")
    fresh = network()
    gift.load(fresh, tmp_path / "one.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(X), net(X))


REFUSED = {
    "methods": (everywhere("dora", rank=1), None, r"(?s)b: 0.weight is changed by a method .*b: 5"),
    "wrappers": (
        FineTuningStrategy([(mc_path("3"), ma_bottleneck())]), None, "b: 3 is wrapped by",
    ),
    "matrices": (
        at("0", rank=1, conv_layout="balanced"), None, "0.weight is one matrix in a and another",
    ),
    "ranks": (everywhere(rank=3), 2, r"b: 3.weight has rank 3, expected 2 or less"),
}  # fmt: skip


@pytest.mark.parametrize(("strategy", "rank", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_padded(strategy: Any, rank: int | None, message: str) -> None:
    """Everything is named, and network and bank are unchanged."""
    net = network()
    bank, outputs = filled(net, {"a": everywhere(rank=2, conv_layout="out_as_h"), "b": strategy})
    before = full_state(net)
    with pytest.raises(gift.AdaptationError, match=message):
        bank.pad(rank)
    assert full_state(net) == before
    with torch.no_grad():
        for name, expected in outputs.items():
            bank.activate(name)
            assert torch.equal(net(X), expected)


@pytest.mark.parametrize("rank", [0, 1.5, True])
def test_wrong_ranks(rank: Any) -> None:
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        DeltaBank(network()).pad(rank)
