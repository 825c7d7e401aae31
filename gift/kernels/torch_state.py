"""What custom autograd functions must respect: autocast, views, tensor subclasses."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gift.private.torch import OVERRIDES_NOTHING


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


def for_every_tensor(
    forward: Callable[..., Tensor], plain: Callable[..., Any]
) -> Callable[..., Tensor]:
    """Decorator for a fast path in the place of a layer's forward pass: it takes what that takes.

    Tensors of other libraries override it, as they do with ``F.linear``: their class sees one
    function, computed with plain tensors, and makes its own of what that gives. In an autograd
    function it would make a view. Nested tensors have no other shape, which fast paths ask for: the
    layer computes with its effective weight.

    Args:
        forward: the fast path.
        plain: the layer's own forward pass.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and x.is_nested:
            return plain(self, *args, **kwargs)
        cls: Any = type(x)
        if cls is Tensor or not _overrides(cls):
            return forward(self, *args, **kwargs)
        found = cls.__torch_function__(MethodType(forward, self), (cls,), args, kwargs)
        return forward(self, *args, **kwargs) if found is NotImplemented else found

    return run


def _overrides(cls: type) -> bool:
    """Whether tensors of that class override functions of torch."""
    if cls is nn.Parameter or not issubclass(cls, Tensor):
        return False
    return cls.__torch_function__ is not OVERRIDES_NOTHING
