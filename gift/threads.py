"""One thread changes a network at a time, and no other computes with it meanwhile.

A change waits until the forward passes of other threads have ended, which it sees in their stacks,
so these pay nothing for it; and it holds back calls of the network that come later. Where there is
one thread, nothing of this is done.

What computes is a method of the network or of a module in it: ``forward``, but ``generate`` as
well, so no sequence is begun by one network and ended by another. A call within such a method is
let through, as the change waits for it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from gift.private.python import frames_of_threads
from gift.private.torch import callers, instead_of_calls

P = ParamSpec("P")
T = TypeVar("T")

LONGEST = 30.0
"""Seconds for which a thread waits for another."""


class _Gate:
    """Of one network: who changes it, and who waits for that."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.opened = threading.Condition()
        self.owner: int | None = None
        self.waiting: set[int] = set()

    def pass_through(self, module: nn.Module) -> bool:
        """Wait until the network is no more being changed.

        Returns:
            Whether that was waited for: the network may be another one now.

        Raises:
            RuntimeError: after `LONGEST`.
        """
        own = threading.get_ident()
        parts = {id(part) for part in module.modules()}
        if own == self.owner or _computes(_before_the_call(module), parts):
            return False
        with self.opened:
            self.waiting.add(own)
            try:
                if not self.opened.wait_for(lambda: self.owner is None, LONGEST):
                    raise _waited(module, "has been changing it")
            finally:
                self.waiting.discard(own)
        return True


_gates: WeakKeyDictionary[nn.Module, _Gate] = WeakKeyDictionary()
_making = threading.Lock()


@contextmanager
def alone(network: Any, insists: bool = False) -> Iterator[None]:
    """Within it, no other thread changes the network or computes with it. It nests.

    Args:
        network: the network; what is none is of no concern.
        insists: go on after `LONGEST` as well, and raise at the end.

    Raises:
        RuntimeError: if another thread has been changing the network, or computing with it, for
            `LONGEST`; nothing was done then.
    """
    if threading.active_count() == 1 or not isinstance(network, nn.Module):
        yield
        return
    with _making:
        gate = _gates.setdefault(network, _Gate())
    if not gate.lock.acquire(timeout=LONGEST):
        raise _waited(network, "has been changing it")
    try:
        if gate.owner is not None:  # this thread
            yield
        else:
            with _held_back(network, gate):
                late = not _all_ended(network, gate)
                if late and not insists:
                    raise _waited(network, "has been computing with it")
                yield
                if late:
                    raise _waited(network, "was still computing with it, whose numbers are lost,")
    finally:
        gate.lock.release()


def changing(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator for what changes its first argument, a network or what has one as ``net``."""

    @wraps(function)
    def change(*args: P.args, **kwargs: P.kwargs) -> T:
        with alone(network_of(args, kwargs)):
            return function(*args, **kwargs)

    return change


def network_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The network that a function of gift is about."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return first if isinstance(first, nn.Module) else getattr(first, "net", None)


@contextmanager
def _held_back(network: nn.Module, gate: _Gate) -> Iterator[None]:
    """Within it, calls by other threads wait."""
    gate.owner = threading.get_ident()
    try:
        with instead_of_calls(network, lambda: gate.pass_through(network)):
            yield
    finally:
        with gate.opened:
            gate.owner = None
            gate.opened.notify_all()


def _all_ended(network: nn.Module, gate: _Gate) -> bool:
    """Wait until no other thread computes with a network; False after `LONGEST`."""
    parts = {id(part) for part in network.modules()}
    until, pause = time.monotonic() + LONGEST, 1e-5
    while any(
        _computes(frame, parts)
        for ident, frame in frames_of_threads().items()
        if ident != gate.owner and ident not in gate.waiting
    ):
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return True


def _computes(frame: FrameType | None, parts: set[int]) -> bool:
    """Whether one of the methods that led to a frame is one of these modules."""
    while frame is not None:
        if _module_of(frame) in parts:
            return True
        frame = frame.f_back
    return False


def _module_of(frame: FrameType) -> int | None:
    """The identity of ``self`` in a method."""
    if frame.f_code.co_varnames[:1] != ("self",):
        return None
    return id(frame.f_locals.get("self"))


def _before_the_call(module: nn.Module) -> FrameType | None:
    """The frame that called a module, whose call this is a part of."""
    called = False
    for frame in callers():
        is_call = _module_of(frame) == id(module) and frame.f_code.co_name in _CALLS
        if called and not is_call:
            return frame
        called = called or is_call
    return None


_CALLS = ("__call__", nn.Module.__call__.__name__)


def _waited(network: nn.Module, why: str) -> RuntimeError:
    return RuntimeError(
        f"another thread {why} for {LONGEST:g} seconds ({type(network).__name__}): let it end, or "
        "change a copy of the network"
    )
