"""Signals that end a run: it writes a checkpoint first."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from gift.support.interrupts import handler_of, set_handler
from gift.training.checkpoint import random_states, restore_states, write_checkpoint

if TYPE_CHECKING:
    from gift.training.run import TrainingRun


class _StopNow(BaseException):
    """Raised by the handler where work can be interrupted and repeated."""


class Signals:
    """Context in which Ctrl-C and SIGTERM wait until a run has written its checkpoint.

    A second Ctrl-C interrupts at once. Handlers that a program set itself are left alone, and so
    are ignored signals. Python runs handlers in the main thread only, so that other threads change
    nothing.

    Args:
        run: the run; one without a folder has nothing to write, and is interrupted at once.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.arrived: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if self.run.result.folder is not None and is_main:
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = handler_of(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = handler
                    set_handler(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler_of(number) == self._note:
                set_handler(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.arrived is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = number
        if self._at_once:
            self._at_once = False
            raise _StopNow

    def check(self, write: bool = True) -> None:
        """Write a checkpoint and end the run if a signal has arrived; all processes must call this.

        Args:
            write: whether the checkpoint must be written, because it is older than the run.
        """
        processes = self.run.processes
        if not self._before and processes.number == 1:
            return
        if processes.sum(self.arrived is not None):
            if write:
                write_checkpoint(self.run)
            self._end()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context for an evaluation, which a signal interrupts, and a resumed run repeats.

        Several processes, which must stop together, finish the evaluation.
        """
        run = self.run
        if not self._before or run.processes.number > 1:
            yield
            return
        random = random_states(run)
        try:
            try:
                self._at_once = True
                yield
            finally:
                self._at_once = False
        except _StopNow:
            restore_states(run, random)
            self.check()

    def _end(self) -> NoReturn:
        number = self.arrived or signal.SIGTERM  # which another process got
        run, name = self.run, signal.Signals(number).name
        done = f"{run.epoch} epochs and {run.steps_done} steps" if run.steps_done else (
            f"{run.epoch} epochs"
        )  # fmt: skip
        text = (
            f"stopped by {name} after {done}: the checkpoint is {run.checkpoint}, "
            "the same call resumes from it"
        )
        if run.processes.first:
            run.say(text)
            if not run.settings.progress:
                print(text, file=sys.stderr)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(text)
        raise SystemExit(128 + number)
