"""Who else follows what is computed, and does not know autograd functions of one's own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocasts(kind: str) -> bool:
    """Whether autocast is on for that kind of device; the meta device has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def gives_no_view(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator for the forward pass of an autograd function: what it gives is no view.

    Views that are made in there must not be written into later, as autograd could not follow. For
    some shapes ``F.linear`` makes one, which of them is a matter of torch's version.
    """

    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Tensor:
        return forward(ctx, *args).detach()  # the same memory and count of writes, no view

    return run


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
