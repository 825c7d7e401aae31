"""What the tests of this folder share; calls that only CUDA has are here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gift import FineTuningStrategy
from gift.factories import ma_adapt, mc_layer
from tests.common import enabled


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Inputs on the device, those in floating point with that dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, PackedSequence):
        return value.to(device=device)._replace(data=moved(value.data, device, dtype))
    return tuple(moved(item, device, dtype) for item in value)


def adapted(net: nn.Module, method: str = "lora", **settings: Any) -> Any:
    """The network with a delta on every known layer, as after some training."""
    strategy = FineTuningStrategy(module_caps=[(mc_layer(), ma_adapt(method, **settings))])
    return enabled(net, strategy)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers of several kinds: some have a fast path, some compute with their effective weight."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 32), nn.LayerNorm(32), nn.Linear(32, 4),
    ).to(dtype)  # fmt: skip


def pictures(number: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Any, expected: Tensor, tolerance: float) -> None:
    """Their distance is a small part of what is expected."""
    exact = expected.detach().cpu().double()
    distance = (found.detach().cpu().double() - exact).norm() / exact.norm().clamp_min(1e-12)
    assert distance <= tolerance, f"{distance:.1e} of what is expected, not {tolerance:.0e}"


def gradients(net: nn.Module) -> Tensor:
    """Of all that is trained, one after the other."""
    found = [(p, p.grad) for p in net.parameters() if p.requires_grad]
    assert all(g is not None for _, g in found)
    return torch.cat([g.to_dense().flatten().cpu().double() for _, g in found if g is not None])


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Context on another stream, after what runs now and before what comes after it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(device: torch.device, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as a CUDA graph, which computes in the same memory; called thrice before."""
    with aside(device):
        for _ in range(3):
            result = function()
    if device.type != "cuda":
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
