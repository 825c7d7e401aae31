"""Defer signals that arrive while a network is being changed.

A signal handler, such as that of Ctrl-C, may raise between any two steps. While a change is under
way, every handler written in Python is therefore replaced by one that records the signal. After the
change is complete or undone, the original handlers are restored and called for the recorded
signals. Python runs handlers in the main thread only, so other threads need none of this.
`gift.support.threads` handles what other threads do meanwhile.

Handlers run between bytecodes: when a function begins, after a call, and at the end of a loop
iteration. So a signal may arrive after `__exit__` has begun, before its first line. The replacement
handler looks at the interrupted frame, and records the signal there too.
"""

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from types import CodeType, FrameType
from typing import Any, ParamSpec, Self, TypeVar

from gift.support.threads import alone, network_of

P = ParamSpec("P")
T = TypeVar("T")
_Arrived = tuple["_Handler", int, FrameType | None]


class _Handler:
    """Replacement for the handler of one signal."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if any(not held.open for held in _holding) or _is_at_an_end(frame):
            _arrived.append((self, number, frame))
        else:
            self.give(number, frame)

    def give(self, number: int, frame: FrameType | None) -> None:
        """Call the original handler."""
        opened = [*_holding]
        for held in opened:  # if it raises, hold later signals until the undo is done
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
    """Replace the handlers; a replacement calls the original unless signals are held."""
    for number in signal.valid_signals():
        now = signal.getsignal(number)
        if callable(now) and not isinstance(now, _Handler | signal.Handlers):
            _replaced[number] = _Handler(now)
            signal.signal(number, _replaced[number])


def _release() -> None:
    """Undo `_watch` if nothing needs it any more; handlers that were set since then stay."""
    if _watching or _holding:
        return
    for number, handler in list(_replaced.items()):
        now: object = signal.getsignal(number)
        if now is handler:
            signal.signal(number, handler.original)
        _replaced.pop(number, None)


def handler_of(number: int) -> Any:
    """Return the handler of a signal: the one under the replacement, if there is one."""
    now = signal.getsignal(number)
    return now.original if isinstance(now, _Handler) else now


def set_handler(number: int, handler: Any) -> None:
    """Set the handler of a signal, under the replacement if there is one."""
    now = signal.getsignal(number)
    if isinstance(now, _Handler) and callable(handler):
        now.original = handler
    else:
        _replaced.pop(number, None)
        signal.signal(number, handler)


def _deliver() -> None:
    """Call the handlers of all recorded signals, even if some of them raise."""
    while _arrived:
        handler, number, frame = _arrived.pop(0)
        try:
            handler.give(number, frame)
        finally:
            _deliver()


class held_interrupts:
    """Context that holds signals and calls their handlers at its end. It can be nested.

    Args:
        open: let signals through until a handler raises, then hold later ones. This is for long
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
        """Hook for the end of the context, while signals still wait."""

    def _leave(self) -> None:
        _holding[:] = [held for held in _holding if held is not self]
        try:
            _release()
        finally:
            if all(held.open for held in _holding):
                _deliver()


class _Switch(ContextDecorator):
    """Context that changes a network and changes it back; signals wait during both changes."""

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
            return value  # no signal can arrive between here and the block
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
    """Like `contextmanager`, for contexts that change a network and change it back."""
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
