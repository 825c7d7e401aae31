"""Layers that have one input, as query, key and value: the way to it is looked for once.

The reference is the same network with ``recompute_inputs=False``, which keeps its inputs.
"""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels import recomputed
from gift.kernels.ways import Way
from tests.common import weighted
from tests.test_recomputed import WIDTH, adapted, always, hidden, not_on_old

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    not_on_old,
]
small = always  # a fixture


def three(recompute: bool = True) -> Any:
    torch.manual_seed(0)
    base = nn.ModuleList(nn.Linear(WIDTH, 8, dtype=torch.float64) for _ in range(3))
    return adapted(base, recompute=recompute, rank=2)


def trained(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.requires_grad]


def norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, (WIDTH,))


def of_all(net: Any, h: Tensor, **options: Any) -> Any:
    x = norm(h)
    total = sum(weighted(layer(x)) for layer in net)
    return torch.autograd.grad(total, [h, *trained(net)], **options)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of the input for each time that a way is looked for."""
    begun: list[int] = []

    class Counted(Way):
        def __init__(self, size: int) -> None:
            begun.append(size)
            super().__init__(size)

    monkeypatch.setattr(recomputed, "Way", Counted)
    return begun


def test_one_search_and_the_same_gradients(searches: list[int]) -> None:
    again, kept = three(), three(recompute=False)
    for _ in range(3):
        torch.testing.assert_close(of_all(again, hidden()), of_all(kept, hidden()))
    assert len(searches) == 3


def test_derivatives_of_gradients() -> None:
    results = []
    for net in (three(), three(recompute=False)):
        h = hidden()
        first = of_all(net, h, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained(net)))
    torch.testing.assert_close(*results)


def test_another_input_in_between(searches: list[int]) -> None:
    results = []
    for net in (three(), three(recompute=False)):
        h = hidden()
        x, other = norm(h), norm(2 * h.flip(0))
        y = weighted(net[0](x)) + weighted(net[1](other)) + weighted(net[2](x))
        results.append(torch.autograd.grad(y, trained(net)))
    torch.testing.assert_close(*results)
    assert len(searches) == 3


def test_the_norms_input_is_written_in_between() -> None:
    """The second layer had the old value, which is lost: it keeps its input.

    Layers that have met a way do not try it each time.
    """
    results = []
    for net in (three(), three(recompute=False)):
        for _ in range(4):
            of_all(net, hidden())
        h = hidden()
        x = norm(h)
        net[0](x)
        with torch.no_grad():
            h.add_(torch.randn(h.shape, generator=torch.Generator().manual_seed(5)))
        results.append(torch.autograd.grad(weighted(net[1](x)), trained(net[1])))
    torch.testing.assert_close(*results)


def test_the_input_is_written_in_between() -> None:
    results = []
    for net in (three(), three(recompute=False)):
        x = norm(hidden())
        net[0](x)
        with torch.no_grad():
            x.mul_(3)
        results.append(torch.autograd.grad(weighted(net[1](x)), trained(net[1])))
    torch.testing.assert_close(*results)


def test_nothing_outlives_the_graph() -> None:
    net = three()
    h = hidden()
    x = norm(h)
    y = net[0](x)
    memory = weakref.ref(h.untyped_storage())
    del h, x
    assert memory() is not None  # the graph needs it
    del y
    assert memory() is None
