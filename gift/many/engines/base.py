"""What all engines have in common."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from gift.many.task import ERROR, LOG

JOB_FILE = "task.yaml"
"""The job of a run, as it is sent to an engine; the run itself writes ``job.yaml``."""


class State(StrEnum):
    """The state of a run, as its engine knows it."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def is_over(self) -> bool:
        """Whether the run will not change any more, as far as the engine knows."""
        return self not in (State.QUEUED, State.RUNNING)


class Engine(Protocol):
    """Starts runs and knows their states.

    A run is a folder with `JOB_FILE`. A handle is what the engine calls the run.
    """

    @property
    def slots(self) -> int | None:
        """Number of runs at a time; None leaves that to a queue of the engine."""

    def start(self, folder: Path) -> Any:
        """Start the run in a folder, or resume it, and return its handle."""

    def state(self, handle: Any) -> State:
        """Return the state of a run."""

    def stop(self, handle: Any) -> None:
        """Stop a run and wait until it has ended; it can be resumed."""

    def reason(self, handle: Any) -> str:
        """Return why a run failed, as far as this is known."""


def reason_in(folder: Path, otherwise: str = "") -> str:
    """Return why the run in a folder failed: its error, else the end of what it printed.

    Args:
        folder: folder of the run.
        otherwise: what is returned if neither says anything.
    """
    return _text(folder / ERROR) or "\n".join(_text(folder / LOG).splitlines()[-5:]) or otherwise


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]  # progress bars
    return "\n".join(line for line in lines if line)
