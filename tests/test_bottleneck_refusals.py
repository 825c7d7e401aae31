"""Bottleneck adapters: what is refused, when one is made and when one is called."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift import enable_fine_tuning
from gift.factories import ma_bottleneck, mc_path
from gift.strategies import BottleneckFineTuningStrategy as Bottlenecks
from tests.common import full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_own_forward() -> nn.Module:
    net = nn.Linear(4, 4)
    net.forward = lambda x: x  # type: ignore[method-assign]
    return net


# the network, where, settings, what the error says
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = {
    "list": (lambda: nn.Sequential(nn.ModuleList([nn.Linear(4, 4)])), "0", {},
             r"0 \(ModuleList\): it is never called, as it has no forward"),
    "dictionary": (lambda: nn.ModuleDict({"a": nn.Linear(4, 4)}), "", {},
                   "the network.*no forward"),
    "out_proj": (lambda: nn.MultiheadAttention(4, 2), "out_proj", {},
                 "never called, as MultiheadAttention reads its weight"),
    "lazy": (lambda: nn.LazyLinear(4), "", {}, "have no shape yet: run a batch"),
    "lazy inside": (lambda: nn.Sequential(nn.LazyLinear(4)), "", {}, "have no shape yet"),
    "unknown": (Unknown, "", {}, r"the features of this \(Unknown\) are not known: give dim="),
    "unknown inside": (lambda: nn.Sequential(nn.Linear(4, 4), Unknown()), "", {}, r"1 \(Unknown\)"),
    "nothing": (nn.Flatten, "", {}, "no layer in it reveals its features: give dim="),
    "two axes": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)), "", {},
                 r"first layer, 0, .*axis -3 .*last one, 2, along axis -1: say axis=1 or axis=-1"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "", {}, "complex"),
    "own forward": (with_own_forward, "", {}, "a forward was set on the object itself"),
    "taken": (lambda: type("Claimed", (nn.Linear,), {"bottleneck_up_bias": 1})(4, 4), "", {},
              r"already has attributes \['bottleneck_up_bias'\]"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "at", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    make: Callable[[], nn.Module], at: str, settings: dict[str, Any], message: str
) -> None:
    net = make()
    before = full_state(net)
    with pytest.raises(ValueError, match=message):
        enable_fine_tuning(net, Bottlenecks(2, after=mc_path(at), **settings))
    assert full_state(net) == before


def test_the_axis_can_be_said_where_it_is_not_clear() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    enable_fine_tuning(net, Bottlenecks(2, after="", axis=-1))
    assert net(torch.randn(5, 3, 2, 2)).shape == (5, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0, expected an integer of at least 1"),
        ({"size": True}, "size is True"),
        ({"activation": "GELU"}, "activation is 'GELU', expected 'gelu' or 'relu'"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"dropout": 1.0, "dim": 0}, "dropout is 1.0.*; dim is 0"),
        ({"axis": 1.5}, "axis is 1.5, expected an integer"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ma_bottleneck(**settings)


# the network, settings, what it is called with, what the error says
CALLS: dict[str, tuple[nn.Module, dict[str, Any], Tensor, str]] = {
    "features": (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))), {}, torch.randn(5, 4),
                 r"the network \(Sequential\) gives torch.float32 of shape \(5, 2, 3\), its "
                 r"bottleneck is for 6 features along axis -1: give dim= and axis="),
    "axis": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), {"axis": 3}, torch.randn(2, 3, 2, 2),
             r"shape \(2, 16\).*4 features along axis 3"),
    "integers": (nn.Identity(), {"dim": 4, "axis": -1}, torch.arange(4), "gives torch.int64"),
    "input": (nn.Linear(4, 4), {"parallel": True, "dim": 3}, torch.randn(2, 4), "takes .*3 feat"),
    "places": (nn.Sequential(nn.Conv1d(4, 4, 1), nn.MaxPool1d(2)), {"parallel": True},
               torch.randn(2, 4, 8), r"gives \(2, 4, 4\), the bottleneck beside it \(2, 4, 8\): "),
}  # fmt: skip


@pytest.mark.parametrize(("net", "settings", "x", "message"), CALLS.values(), ids=CALLS)
def test_a_call_that_does_not_fit(
    net: nn.Module, settings: dict[str, Any], x: Tensor, message: str
) -> None:
    net = copy.deepcopy(net)
    enable_fine_tuning(net, Bottlenecks(2, after="", **settings))
    with pytest.raises(ValueError, match=message):
        net(x)
