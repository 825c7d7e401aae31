"""Runs on this machine: in processes of their own, or in this process."""

import os
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gift.many.engines.base import PATIENCE, State, reason_in, start_process
from gift.many.task import StoppedError, read_task, run_task


@dataclass
class _Process:
    folder: Path
    slot: int
    process: subprocess.Popen[bytes]


class Processes:
    """Each run is a process, which ends with this one, however that ends.

    With several GPUs, each run sees one of them. Without one, the processors are shared.

    Args:
        slots: number of runs at a time.
        network: ``import:package.module:function``, for jobs that name no network.
        processes: number of processes of each run, which train together.
    """

    def __init__(self, slots: int = 1, network: str | None = None, processes: int = 1) -> None:
        self.slots = slots
        self.network = network
        self.processes = processes
        self._free = list(range(slots))

    def start(self, folder: Path) -> _Process:
        """Start the run in a folder, or resume it."""
        slot = self._free.pop(0)
        process = start_process(
            folder, self.processes, self.network,
            env=self._environment(slot), start_new_session=True,
        )  # fmt: skip
        return _Process(folder, slot, process)

    def state(self, handle: _Process) -> State:
        """Return the state of a run."""
        code = handle.process.poll()
        if code is None:
            return State.RUNNING
        if handle.slot not in self._free:
            self._free.append(handle.slot)
            self._free.sort()
        return State.FAILED if code else State.DONE

    def stop(self, handle: _Process) -> None:
        """Stop a run and wait until it has ended."""
        handle.process.terminate()
        try:
            handle.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            handle.process.kill()
            handle.process.wait()
        with suppress(OSError):
            handle.process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        self.state(handle)

    def reason(self, handle: _Process) -> str:
        """Return why a run failed, as far as this is known."""
        code = handle.process.returncode
        ended = f"it was ended by signal {-code}" if code and code < 0 else f"it ended with {code}"
        return ended if code and code < 0 else reason_in(handle.folder, ended)

    def _environment(self, slot: int) -> dict[str, str]:
        own = dict(os.environ)
        if torch.cuda.is_available():
            given = own.get("CUDA_VISIBLE_DEVICES")
            seen = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
            own["CUDA_VISIBLE_DEVICES"] = seen[slot % len(seen)]
        elif "OMP_NUM_THREADS" not in own:
            own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.slots))
        return own


@dataclass
class _Thread:
    folder: Path
    thread: threading.Thread
    stop: threading.Event
    error: BaseException | None = None


class Here:
    """Runs in this process, one at a time, with a network that only code can give.

    Args:
        network: returns a new network for each run.
    """

    slots = 1

    def __init__(self, network: Callable[[], Any]) -> None:
        self.network = network

    def start(self, folder: Path) -> _Thread:
        """Start the run in a folder, or resume it."""

        def run() -> None:
            try:
                run_task(read_task(folder), self.network(), handle.stop)
            except BaseException as error:  # reported by `state` and `reason`
                handle.error = error

        handle = _Thread(folder, threading.Thread(target=run, daemon=True), threading.Event())
        handle.thread.start()
        return handle

    def state(self, handle: _Thread) -> State:
        """Return the state of a run."""
        if handle.thread.is_alive():
            return State.RUNNING
        if isinstance(handle.error, StoppedError):
            return State.CANCELLED
        return State.DONE if handle.error is None else State.FAILED

    def stop(self, handle: _Thread) -> None:
        """Stop a run after its current step."""
        handle.stop.set()
        handle.thread.join()

    def reason(self, handle: _Thread) -> str:
        """Return the error of the run."""
        return f"{type(handle.error).__name__}: {handle.error}"
