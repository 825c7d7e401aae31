"""Who else follows what is computed, and does not know autograd functions of one's own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a transform of torch.func, dual numbers or a trace of TorchScript follows."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.autograd.forward_ad._current_level >= 0  # dual numbers, made by hand
    )


def is_batched(g: Tensor) -> bool:
    """Whether a gradient stands for several (`is_grads_batched`): few operations allow that."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(g)


def is_known(condition: bool) -> bool:
    """Whether it holds; compiled, whether it does for all sizes that the graph serves."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second

    return statically_known_true(condition)


def autocasts(kind: str) -> bool:
    """Whether autocast is on for that kind of device; the meta device has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Decorator for a backward pass whose tensors have one dtype already.

    It may run under another autocast than its forward pass did.
    """

    @functools.wraps(backward)
    def run(ctx: Any, g: Tensor) -> Any:
        if not autocasts(g.device.type):
            return backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g)

    return run
