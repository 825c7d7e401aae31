"""What a job of Ray does: its driver gives the run to Ray as a task, and waits for it.

This file is the entrypoint of the job. Drivers of runs that wait need memory on the head node, so
that it imports Ray alone; gift and torch are imported where the task runs.
"""

import importlib
import json
import logging
import os
import signal
import sys
import threading
from typing import Any

TASK = "gift_run"
"""Name of the task in Ray's lists."""

_PATIENCE = 90.0  # seconds in which a run that is cancelled may write a checkpoint
_EACH = 0.5  # seconds between two looks at the task


def drive(options: dict[str, Any], *arguments: Any) -> int:
    """Run `train` as a task of Ray, and return the code with which to exit.

    Args:
        options: what the task takes, and how often it is started again.
        arguments: those of `train`, without the last.
    """
    ray: Any = importlib.import_module("ray")
    ray.init(logging_level=logging.WARNING, log_to_driver=False)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # after Ray's own
    task = ray.remote(train).options(name=TASK, **options).remote(*arguments, os.getcwd())
    while not ray.wait([task], timeout=_EACH)[0]:
        if stopped.is_set():
            ray.cancel(task)
            ray.wait([task], timeout=_PATIENCE)
            return 128 + signal.SIGTERM
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        print(getattr(error, "cause", None) or error, file=sys.stderr)
        return 1
    return 0


def train(folder: str, processes: int, network: str | None, place: str) -> None:
    """Run the job in a folder as a process of its own, within what Ray gave to this task.

    Args:
        folder: folder of the run.
        processes: number of processes that train together.
        network: ``import:package.module:function``, for a job that names no network.
        place: working directory.
    """
    import os
    from pathlib import Path

    from gift.many.engines.watched import Watched

    os.chdir(place)
    # Ray kills the process group of a worker that it ends; a run in a session of its own is left
    # the time for a checkpoint.
    watched = Watched(Path(folder), processes, network, os.setsid)
    try:
        watched.run()
    except KeyboardInterrupt:  # so `ray.cancel` comes to a task
        watched.stop()
        raise


if __name__ == "__main__":
    sys.exit(drive(*json.loads(sys.argv[1])))
