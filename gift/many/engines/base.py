"""What all engines have in common."""

import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from gift.many.task import ERROR, JOB_FILE, LOG, SEARCH_FILE

PATIENCE = 60.0
"""Seconds in which a run that is stopped may write a checkpoint."""

RESTARTS = 3
"""How often a run whose processes are killed is started again on one machine."""


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


@dataclass(frozen=True)
class Listed:
    """A run, as its engine lists it.

    Args:
        id: what the engine calls it.
        engine: name of the engine.
        state: its state.
        folder: folder of the run; None if the engine does not say.
        elapsed: how long it has run, as the engine says it.
        note: why it waits or failed, as the engine says it.
    """

    id: str
    engine: str
    state: State
    folder: Path | None
    elapsed: str = ""
    note: str = ""


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


def task_command(folder: Path, processes: int = 1, network: str | None = None) -> list[str]:
    """Return the command that runs the job in a folder.

    Args:
        folder: folder of the run.
        processes: number of processes, which torchrun starts; the part of a search is one.
        network: ``import:package.module:function``, for a job that names no network.
    """
    start = [sys.executable, "-m"]
    if processes > 1 and not (folder / SEARCH_FILE).is_file():
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    named = [] if network is None else ["--network", network]
    return [*start, "gift", "task", str(folder / JOB_FILE), *named]


def start_process(
    folder: Path, processes: int = 1, network: str | None = None, **options: Any
) -> "subprocess.Popen[bytes]":
    """Start the job in a folder as a process, which ends when this one does.

    Args:
        folder: folder of the run.
        processes: see `task_command`.
        network: see `task_command`.
        options: further arguments of `subprocess.Popen`.
    """
    command = [*task_command(folder, processes, network), "--attended"]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, **options
        )
