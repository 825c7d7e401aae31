"""Layers that are compiled before anybody called them: one graph, and what they give eagerly."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer
from gift.methods import METHODS
from tests.cases.selection import cells

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

# Sizes of their own for each method, so that nothing is known of them yet.
LAYERS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda n: nn.Linear(n, n + 1), lambda n: torch.randn(2, 3, n)),
    "conv": (lambda n: nn.Conv2d(n, 5, 3), lambda n: torch.randn(2, n, 6, 6)),
    "embedding": (lambda n: nn.Embedding(n, 6), lambda n: torch.randint(0, n, (3, 4))),
}


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cells(method=[*METHODS], layer=[*LAYERS])
def test_every_method_compiles_before_any_call(method: str, layer: str, dynamo: None) -> None:
    make, inputs = LAYERS[layer]
    size = 50 + list(METHODS).index(method)
    net, x = make(size), inputs(size)
    enable_fine_tuning(net, FineTuningStrategy([(mc_layer(), ma_adapt(method))]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    eager = copy.deepcopy(net)
    y = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    expected = eager(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    found, wanted = (
        torch.autograd.grad(out.square().mean(), list(of.parameters()))
        for out, of in ((y, net), (expected, eager))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
