"""Signals that arrive while a network is being changed wait until it is done.

A handler such as that of Ctrl-C may raise between any two steps. While a change is under way, every
handler that is written in Python is therefore replaced by one that takes a note of the signal; when
the change is complete, or undone, the handlers stand again and get what arrived. Python runs
handlers in the main thread alone, so other threads need none of this; what they do meanwhile is
the matter of `gift.threads`.

Handlers run between bytecodes: when a function begins, after a call and at the end of a turn of a
loop. A signal may so arrive when `__exit__` has begun, before its first line. The replaced handler
sees the frame that was interrupted, and takes a note there as well.
"""

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from types import CodeType, FrameType
from typing import Any, ParamSpec, Self, TypeVar

from gift.threads import alone, network_of

P = ParamSpec("P")
T = TypeVar("T")
_Arrived = tuple["_Handler", int, FrameType | None]


class _Handler:
    """Stands for the handler of one signal."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if any(not held.open for held in _holding) or _is_at_an_end(frame):
            _arrived.append((self, number, frame))
        else:
            self.give(number, frame)

    def give(self, number: int, frame: FrameType | None) -> None:
        """Call the handler."""
        opened = [*_holding]
        for held in opened:  # if this raises, all else waits until the change is undone
            held.open = False
        self.original(number, frame)
        for held in opened:
            held.open = True


_holding: list["held_interrupts"] = []
_watching: list[object] = []
_arrived: list[_Arrived] = []
_replaced: dict[int, _Handler] = {}
_ends: set[CodeType] = set()


def _is_at_an_end(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _ends:
            return True
        frame = frame.f_back
    return False


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _watch() -> None:
    """Replace the handlers; one that is replaced does what it did, unless something is held."""
    for number in signal.valid_signals():
        now = signal.getsignal(number)
        if callable(now) and not isinstance(now, _Handler | signal.Handlers):
            _replaced[number] = _Handler(now)
            signal.signal(number, _replaced[number])


def _release() -> None:
    """Undo `_watch`, if nobody needs it any more; handlers that were set since stay."""
    if _watching or _holding:
        return
    for number, handler in list(_replaced.items()):
        now: object = signal.getsignal(number)
        if now is handler:
            signal.signal(number, handler.original)
        _replaced.pop(number, None)


def _deliver() -> None:
    """Give the handlers what arrived; all of it, whichever of them raises."""
    while _arrived:
        handler, number, frame = _arrived.pop(0)
        try:
            handler.give(number, frame)
        finally:
            _deliver()


class held_interrupts:
    """Within it, signals wait; then their handlers are called. It nests.

    Args:
        open: let them through until one raises, and hold what comes after that. That is for long
            work that is undone if it is interrupted.
    """

    def __init__(self, open: bool = False) -> None:
        self.opens = open
        self.open = False
        self.main = False

    def __enter__(self) -> Self:
        if _is_main():
            self.main = True
            try:
                _watch()
                _holding.append(self)
                self.open = self.opens
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False
        try:
            self.ending(*error)
        finally:
            if self.main:
                self._leave()

    def ending(self, *error: Any) -> None:
        """What is done at the end, while signals wait."""

    def _leave(self) -> None:
        _holding[:] = [held for held in _holding if held is not self]
        try:
            _release()
        finally:
            if all(held.open for held in _holding):
                _deliver()


class _Switch(ContextDecorator):
    """A ``with`` block in which a network is another one: signals wait at both of its ends."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]], network: Any) -> None:
        self._make = make
        self._network = network
        self._manager: AbstractContextManager[Any] | None = None

    def _recreate_cm(self) -> Self:
        return type(self)(self._make, self._network)

    def __enter__(self) -> Any:
        self._manager = manager = self._make()
        if not _is_main():
            return self._enter(manager)
        hold = held_interrupts()
        hold.__enter__()
        try:
            _watching.append(self)
            value = self._enter(manager)
        except BaseException as error:
            if self in _watching:
                _watching.remove(self)
            hold.__exit__(type(error), error, error.__traceback__)
            raise
        _holding[:] = [held for held in _holding if held is not hold]
        if not _arrived or _holding:
            return value  # no signal can arrive between that and the block
        try:
            _deliver()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return value

    def __exit__(self, *error: Any) -> bool | None:
        assert self._manager is not None
        if not _is_main():
            return self._leave(self._manager, *error)
        with held_interrupts():
            try:
                return self._leave(self._manager, *error)
            finally:
                if self in _watching:
                    _watching.remove(self)

    def _enter(self, manager: AbstractContextManager[Any]) -> Any:
        with alone(self._network):
            return manager.__enter__()

    def _leave(self, manager: AbstractContextManager[Any], *error: Any) -> bool | None:
        with alone(self._network, insists=True):
            return manager.__exit__(*error)


def switching(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Decorator as `contextmanager`, for a block in which a network is another one."""
    make = contextmanager(function)

    @functools.wraps(function)
    def switch(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Switch(lambda: make(*args, **kwargs), network_of(args, kwargs))

    return switch


_ends |= {
    held_interrupts.__exit__.__code__,
    _Switch.__enter__.__code__,
    _Switch.__exit__.__code__,
}
