"""Several jobs, run until all have ended."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gift.jobs.models import Job
from gift.many.engines.base import Engine, State
from gift.many.task import finished, write_task

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
    jobs: Mapping[str, Job], engine: Engine, tell: Callable[[str, Ended], None], most: int = 1
) -> dict[str, Ended]:
    """Run jobs, each in its folder; what is done is not done again, what was stopped goes on.

    If this call is interrupted, the runs are stopped.

    Args:
        jobs: the jobs by name.
        engine: where they run.
        tell: called with the name of each job that has ended.
        most: number of runs at a time, if the engine has a queue.
    """
    ended: dict[str, Ended] = {}
    waiting, running = dict(jobs), dict[str, Any]()

    def note(name: str, how: Ended) -> None:
        ended[name] = how
        tell(name, how)

    try:
        while waiting or running:
            while waiting and len(running) < (engine.slots or most):
                name, job = next(iter(waiting.items()))
                del waiting[name]
                if (result := finished(job)) is not None:
                    note(name, Ended(result, was_done=True))
                else:
                    running[name] = engine.start(write_task(job))
            for name, handle in list(running.items()):
                state = engine.state(handle)
                if state.is_over:
                    del running[name]
                    result = finished(jobs[name]) if state is State.DONE else None
                    reason = "" if result is not None else engine.reason(handle)
                    note(name, Ended(result, reason))
            if running:
                time.sleep(_EACH)
    except BaseException:
        for handle in running.values():
            engine.stop(handle)
        raise
    return ended
