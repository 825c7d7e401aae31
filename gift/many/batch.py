"""Several jobs, run until all have ended."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gift.jobs.models import Job
from gift.many.engines.base import Engine, State
from gift.many.task import finished, write_task

K = TypeVar("K")

_EACH = 0.2  # seconds between two looks at the runs


@dataclass(frozen=True)
class Ended:
    """How the run of a job ended.

    Args:
        result: what `gift.many.task.run_task` wrote; None if it failed.
        reason: why it failed.
        was_done: whether it was done before.
    """

    result: dict[str, Any] | None
    reason: str = ""
    was_done: bool = False


def run_all(
    jobs: Mapping[K, Job], engine: Engine, tell: Callable[[K, Ended], None], most: int = 1
) -> dict[K, Ended]:
    """Run jobs, each in its folder: runs that are done are not repeated, stopped ones continue.

    If this call is interrupted, the runs are stopped.

    Args:
        jobs: the jobs by any keys.
        engine: where they run.
        tell: called with the key of each job that has ended.
        most: number of runs at a time, if the engine has a queue.

    Returns:
        How each run ended, in the order of the jobs.
    """
    ended: dict[K, Ended] = {}
    waiting, running = dict(jobs), dict[K, Any]()

    def note(key: K, how: Ended) -> None:
        ended[key] = how
        tell(key, how)

    try:
        while waiting or running:
            while waiting and len(running) < (engine.slots or most):
                key, job = next(iter(waiting.items()))
                del waiting[key]
                if (result := finished(job)) is not None:
                    note(key, Ended(result, was_done=True))
                else:
                    running[key] = engine.start(write_task(job))
            for key, handle in list(running.items()):
                state = engine.state(handle)
                if state.is_over:
                    del running[key]
                    result = finished(jobs[key]) if state is State.DONE else None
                    reason = "" if result is not None else engine.reason(handle)
                    note(key, Ended(result, reason))
            if running:
                time.sleep(_EACH)
    except BaseException:
        for handle in running.values():
            engine.stop(handle)
        raise
    return {key: ended[key] for key in jobs}
