"""What custom autograd functions must respect: autocast, views, tensor subclasses."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gift.private.torch.tensors import OVERRIDES_NOTHING, writes_of


def autocasts(kind: str) -> bool:
    """Whether autocast is enabled for that device type; the meta device has no autocast."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def gives_no_view(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator for the forward pass of an autograd function: ensure that its output is not a view.

    Autograd forbids in-place writes to views that were made inside a function. For some shapes
    ``F.linear`` returns a view; for which ones depends on torch's version.
    """

    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Tensor:
        return forward(ctx, *args).detach()  # the same memory and version counter, not a view

    return run


def without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Decorator for a backward pass whose tensors already have one dtype: disable autocast.

    The backward pass may run under another autocast state than the forward pass did.
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
    """Decorator for a fast path that replaces a layer's forward pass: accept all its inputs.

    Tensor subclasses of other libraries override the fast path as they override ``F.linear``: their
    class sees one function, which is computed with plain tensors, and wraps the result. Within an
    autograd function, wrapping would make a view. Nested tensors have no regular shape, which fast
    paths need: for them the layer computes with its effective weight.

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


class Writes:
    """Detects whether a tensor was written into, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.detach()  # shares the version counter of the tensor
        self.alias.data = tensor.new_empty(0)
        self.before = writes_of(self.alias)

    def happened(self) -> bool:
        """Return whether it was written into, or may have been."""
        return self.before is None or writes_of(self.alias) != self.before
