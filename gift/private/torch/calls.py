"""Calls of modules: who calls, how a compiled module is named, what runs before a call."""

import contextlib
import dis
import inspect
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn

PARTS = ("torch.nn.Module._call_impl",)

COMPILED = "_orig_mod"
"""The name of the original module in the result of ``torch.compile``, and so in its state dicts.
Existing files have such names, whatever this version of torch calls it."""


def callers() -> Iterator[FrameType]:
    """The frames of the callers, innermost first; empty if Python provides no frames."""
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and (frame := frame.f_back) is not None:
        yield frame


def loads_strictly() -> bool:
    """Whether missing and unexpected keys of the state that a module is loading are errors.

    torch does not pass ``strict`` to the hooks of submodules, so this reads it from the frame of
    `load_state_dict`. False if there is no such frame.
    """
    load = nn.Module.load_state_dict.__code__
    frame = next((frame for frame in callers() if frame.f_code is load), None)
    return frame is not None and frame.f_locals.get("strict") is True


def asks_until(function: Callable[..., Any]) -> int:
    """The offset in a function's bytecode up to which it asks whether arguments override torch.

    Functions of torch begin with ``if has_torch_function(...)``, and the type of a tensor is asked
    in the same way there and by each operation that the function calls later. No public name tells
    one from the other. Zero if the function does not begin so.
    """
    for step in dis.get_instructions(function):
        if step.argval == "handle_torch_function":
            return step.offset
    return 0


_COMPILED_CALL = "_compiled_call_impl"


class _Instead:
    """Temporary replacement for the call of a module; afterwards it only calls the module."""

    def __init__(self, module: nn.Module, first: Callable[[], bool]) -> None:
        self.module = module
        self.first: Callable[[], bool] | None = first
        self.compiled = module.__dict__.get(_COMPILED_CALL)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if self.first is not None and self.first():
            return type(module).__call__(module, *args, **kwargs)
        return (self.compiled or module._call_impl)(*args, **kwargs)

    def take_out(self, state: dict[str, Any]) -> None:
        """Restore the entry in the module's ``__dict__``."""
        if self.compiled is None:
            del state[_COMPILED_CALL]
        else:
            state[_COMPILED_CALL] = self.compiled


@contextlib.contextmanager
def instead_of_calls(module: nn.Module, first: Callable[[], bool]) -> Iterator[None]:
    """Context in which calls of a module run `first`, and start again if that returns True.

    A hook would come too late, because torch has chosen the forward method before it runs hooks. If
    torch has no place for a compiled call, calls are unchanged.
    """
    instead = _Instead(module, first)
    if hasattr(nn.Module, _COMPILED_CALL):
        module.__dict__[_COMPILED_CALL] = instead
    try:
        yield
    finally:
        instead.first = None
        as_called(module.__dict__)


def as_called(state: dict[str, Any]) -> None:
    """Remove the replacement of `instead_of_calls` from the ``__dict__`` of a module."""
    instead = state.get(_COMPILED_CALL)
    if isinstance(instead, _Instead):
        instead.take_out(state)
