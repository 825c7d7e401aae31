"""Casts and moves while a network is fine-tuned: what is given back is of one dtype and device."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift.factories import ma_freeze, ma_replace, ma_train, mc_path
from gift.strategies import DoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy

from .common import enabled


class Net(nn.Module):
    """A convolution, a norm with buffers of two kinds, a head, and a table of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("table", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.body(x)[:, self.table])


def _strategy() -> gift.FineTuningStrategy:
    """LoRA, a layer trained as it is, and a new head."""
    caps = [
        (mc_path("head"), ma_replace(lambda old: nn.Linear(4, 3))),
        (mc_path("body"), ma_train()),
        (mc_path("norm"), ma_freeze()),
        *LoRAConvFineTuningStrategy(rank=2).module_caps,
    ]
    return gift.FineTuningStrategy(caps)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "bfloat16": lambda net: net.bfloat16(),
    "double": lambda net: net.double(),
    "half": lambda net: net.half(),
    "to": lambda net: net.to("cpu", torch.float64),
    "meta": lambda net: net.to("meta"),
    "empty": lambda net: net.to("meta").to_empty(device="cpu"),
    "there and back": lambda net: net.double().float(),
    "parts": lambda net: [part.bfloat16() for part in net.children()],
}


def _places(net: nn.Module) -> dict[str, Any]:
    named = [*nn.Module.named_parameters(net), *net.named_buffers()]
    return {name: (tensor.dtype, tensor.device.type) for name, tensor in named}


def _runs(net: Any) -> None:
    if not net.table.is_meta and not torch.equal(net.table, torch.arange(4)):
        return  # memory without values, or none
    parameter = next(nn.Module.parameters(net))
    net(torch.randn(2, 3, 6, 6).to(parameter))


def _as_plain(cast: Any, base: nn.Module) -> Any:
    plain = copy.deepcopy(base)
    cast(plain)
    return _places(plain)


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean.normal_()
    return net.eval()


@pytest.mark.parametrize("cast", CASTS)
def test_disabled_after_a_cast(cast: str, base: nn.Module) -> None:
    net, expected = copy.deepcopy(base), _as_plain(CASTS[cast], base)
    enabled(net, _strategy())
    CASTS[cast](net)
    before = _places(net)
    for _ in range(2):
        with gift.disabled(net):
            assert _places(net) == expected
            _runs(net)
        assert _places(net) == before
        _runs(net)
    twin = pickle.loads(pickle.dumps(net))
    for one in (net, copy.deepcopy(net), twin):
        gift.disable_fine_tuning(one)
        assert _places(one) == expected
        _runs(one)
    if cast in ("bfloat16", "half", "double", "to"):  # the values are those of the base, cast
        plain = copy.deepcopy(base)
        CASTS[cast](plain)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_while_disabled(cast: str, base: nn.Module) -> None:
    net, expected = copy.deepcopy(base), _as_plain(CASTS[cast], base)
    enabled(net, _strategy())
    with gift.disabled(net):
        CASTS[cast](net)
    assert len({place for name, place in _places(net).items() if "table" not in name
                and "num_batches" not in name}) == 1  # fmt: skip
    _runs(net)
    gift.disable_fine_tuning(net)
    assert _places(net) == expected


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_while_merged_is_undone(cast: str, base: nn.Module) -> None:
    net = enabled(copy.deepcopy(base), _strategy())
    before, values = _places(net), copy.deepcopy(net.state_dict())
    with gift.merged(net):
        CASTS[cast](net)
    assert _places(net) == before
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    gift.disable_fine_tuning(net)
    assert _places(net) == _places(base)


@pytest.mark.parametrize("cast", [key for key in CASTS if key != "empty"])
def test_a_bank_follows(cast: str, base: nn.Module) -> None:
    expected = _as_plain(CASTS[cast], base)
    net = copy.deepcopy(base)
    bank = gift.DeltaBank(net)
    for name in ("a", "b"):
        bank.add(name, strategy=_strategy())
    bank.activate("a")
    CASTS[cast](net)
    active = _places(net)
    for name in ("b", "a", "b"):
        bank.activate(name)
        assert _places(net) == active
        _runs(net)
    bank.activate(None)
    assert _places(net) == expected
    _runs(net)


def test_a_layout_of_memory_derives_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen weight moves in memory, what was derived from it does not."""
    net = enabled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), DoRAAllFineTuningStrategy(rank=2))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        net[0].lora_B.normal_()
    expected, derived = net(x), []
    method = type(net[0]._gift_weights["weight"].method)
    own = method.derived
    monkeypatch.setattr(method, "derived", lambda *given: derived.append(1) or own(*given))
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), expected)
    assert derived == []
