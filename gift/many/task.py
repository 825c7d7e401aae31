"""One run of many: `run_task` runs a job and writes what came of it as ``result.json``.

The hidden command ``gift task`` calls it in the processes that engines start.
"""

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from gift.errors import GiftError
from gift.jobs.models import Job
from gift.jobs.reading import read_job, write_job
from gift.jobs.running import run_job
from gift.jobs.runs import Run
from gift.support.atomic_files import write_text
from gift.training import Result
from gift.training.distributed import rank
from gift.training.metrics import METRICS
from gift.training.tasks import TASKS

JOB_FILE = "task.yaml"
"""The job of a run, as it is sent to an engine; the run itself writes ``job.yaml``."""

SEARCH_FILE = "search.yaml"
"""The search, in the folder of a part of one; its `JOB_FILE` then says what it takes."""

RESULT, ERROR, LOG, LOCK = "result.json", "error.txt", "output.log", ".task.lock"
_WAIT = 60.0  # seconds in which the process that ran the job before must end


class StoppedError(GiftError):
    """A run was stopped by whoever started it; it can be resumed."""


def run_task(job: Job, network: Any = None, stop: threading.Event | None = None) -> dict[str, Any]:
    """Run a job, or resume it, and write ``result.json`` into its folder.

    Args:
        job: the job.
        network: replaces the network that the job names, as in `gift.jobs.run_job`.
        stop: once it is set, the run ends after its current step.

    Returns:
        The content of the file: the job, metrics before and after training on the new task and
        the old one, numbers of parameters, ``megabytes`` of the delta, ``seconds`` of all epochs,
        ``step_seconds`` (the median), ``peak_memory`` in bytes (of the GPU if there is one, else of
        the process), and ``watch``, the metric by which the best epoch was chosen.

    Raises:
        StoppedError: if `stop` was set.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK, timeout=_WAIT) if rank() == 0 else nullcontext():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        (folder / ERROR).unlink(missing_ok=True)
        try:
            with _timed_steps(stop) as times:
                result = run_job(job, network)
        except Exception as error:
            if rank() == 0 and not isinstance(error, StoppedError):
                known = isinstance(error, GiftError | ValueError)
                what = f"{error}" if known else f"{type(error).__name__}: {error}"
                write_text(folder / ERROR, f"{what}\n")
            raise
        content = _content(job, result, times)
        if rank() == 0:
            write_text(folder / RESULT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content


def write_task(job: Job) -> Path:
    """Write a job into its folder, where engines look for it, and return the folder."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_job(job, folder / JOB_FILE)
    return folder


def read_task(folder: Path) -> Job:
    """Read the job that `write_task` wrote into a folder."""
    return read_job(folder / JOB_FILE)


def finished(job: Job) -> dict[str, Any] | None:
    """Return what `run_task` wrote for exactly this job; None if it was not finished."""
    found = read_result(Path(job.folder))
    if found is None or not isinstance(found.get("job"), dict):
        return None
    before, now = found["job"], job.to_config()
    parts = now.keys() - {"resources"}  # they change nothing of the result
    return found if all(before.get(part) == now[part] for part in parts) else None


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what `run_task` wrote into a folder; None if it wrote nothing that can be read."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _timed_steps(stop: threading.Event | None) -> Iterator[list[float]]:
    """Context that yields the times of all steps that optimizers make in this thread."""
    own, times = threading.get_ident(), []

    def step(optimizer: Optimizer, *_: Any) -> None:
        if threading.get_ident() != own:
            return
        times.append(time.monotonic())
        if stop is not None and stop.is_set():
            raise StoppedError("the run was stopped")

    handle = register_optimizer_step_post_hook(step)
    try:
        yield times
    finally:
        handle.remove()


def _content(job: Job, result: Result, times: list[float]) -> dict[str, Any]:
    watch = watched(job, result.task)
    steps = [after - before for before, after in pairwise(times)]
    names = ("network", "task", "stopped", "best_epoch", "before", "after", "old_before",
             "old_after", "trained", "total")  # fmt: skip
    content: dict[str, Any] = {name: getattr(result, name) for name in names}
    content |= {
        "job": job.to_config(),
        "strategy": result.strategy,
        "epochs": len(result.history),
        "seconds": sum(row.get("seconds", 0.0) for row in result.history),
        "step_seconds": statistics.median(steps) if steps else None,
        "peak_memory": _peak_memory(),
        "megabytes": None,
        "watch": watch,
        "forgetting": forgetting(result.old_before, result.old_after, watch),
    }
    if rank() == 0:
        content["megabytes"] = Run(job.folder).delta().stat().st_size / 1e6
    return content


def watched(job: Job, task: str) -> str:
    """Return the name of the metric by which the best epoch of a job is chosen."""
    return job.training.watch or TASKS[task].watch


def forgetting(before: dict[str, float], after: dict[str, float], watch: str) -> float | None:
    """Return how much worse the old task became; None if there is none.

    It is measured by accuracy where there is one, else by the watched metric or the loss.
    """
    for name in ("accuracy", watch, "loss"):
        if name in before and name in after:
            change = after[name] - before[name]
            return -change if is_higher_better(name) else change
    return None


def is_higher_better(name: str) -> bool:
    """Return whether a higher value of a metric is better."""
    return any(own[name].higher for own in METRICS.values() if name in own)


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def end_with_input() -> None:
    """End this process when its standard input is closed: whoever started it is gone."""

    def wait() -> None:
        # not by sys.stdin, whose lock would be held when the process ends
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_WAIT / 2)  # for a checkpoint
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()
