"""What a user defined and used is freed with its last user: gift keeps no class or network."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import DeltaBank
from gift.factories import ma_adapt, mc_layer
from gift.schedules import FreezeUnfreeze
from gift.strategies import LoRAAllFineTuningStrategy
from tests.common import enabled

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning")

X = torch.randn(2, 4)


def of_a_layer() -> type:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    net = nn.Sequential(Layer(4, 4), nn.Linear(4, 2))
    enabled(net)
    net(X).sum().backward()
    with gift.merged(net), gift.disabled(enabled(copy.deepcopy(nn.Sequential(Layer(4, 4))))):
        pass
    return Layer


def of_a_network() -> type:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    net = Net()
    bank = DeltaBank(net)
    bank.add("a", strategy=LoRAAllFineTuningStrategy())
    bank.add("b", strategy=LoRAAllFineTuningStrategy())
    with bank.rows(["a", "b"]):
        net(X)
    bank.activate("a")
    schedule = FreezeUnfreeze(1)
    schedule.attach(net)
    schedule.step(1, torch.optim.SGD(net.parameters(), 0.1))
    gift.merge(net)
    return Net


def of_a_tensor() -> type:
    class Kind(Tensor):
        pass

    net = nn.Linear(4, 4)
    net.weight = nn.Parameter(net.weight.detach().as_subclass(Kind))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    net(X).sum().backward()
    return Kind


def of_a_strategy() -> type:
    class Mine(gift.FineTuningStrategy):
        def __init__(self) -> None:
            super().__init__([(mc_layer(), ma_adapt("lora"))])

    gift.enable_fine_tuning(nn.Sequential(nn.Linear(4, 4)), Mine())
    return Mine


KINDS: dict[str, Callable[[], type]] = {
    "layer": of_a_layer,
    "network": of_a_network,
    "tensor": of_a_tensor,
    "strategy": of_a_strategy,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_is_freed(kind: str) -> None:
    known = weakref.ref(KINDS[kind]())
    for _ in range(3):  # what one collection frees may hold what the next one does
        gc.collect()
    assert known() is None, [type(one) for one in gc.get_referrers(known())]


@pytest.mark.parametrize("act", [gift.merge, gift.disable_fine_tuning, pickle.dumps, lambda n: n])
def test_a_network_is_freed(act: Any) -> None:
    net = enabled(nn.Sequential(nn.Linear(4, 4)))
    known = [weakref.ref(one) for one in (net, net[0], net[0]._parameters["weight"])]
    act(net)
    del net
    gc.collect()
    assert [ref() for ref in known] == [None] * 3
