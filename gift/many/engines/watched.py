"""A run as a process of its own, which is started again if it dies."""

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gift.many.engines.base import PATIENCE, RESTARTS, reason_in, start_process

_DEATHS = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
_STOPPED = "SignalException"  # torchrun's error after a signal
_EACH = 0.2  # seconds between two looks at the process


class Watched:
    """What the job of an engine does: it starts the run as a process of its own, and watches it.

    A process that is killed by a signal is started again, and resumes from its checkpoint. Of
    several processes, torchrun ends all if one dies, but does not say whether a signal ended it:
    they are started again unless they fail twice for the same reason. torchrun's own restarts are
    not used, since the new processes then look for each other at the addresses of the old ones.
    If the process that watches is killed, the run ends with a checkpoint.

    Args:
        folder: folder of the run.
        processes: number of processes that train together.
        network: ``import:package.module:function``, for a job that names no network.
        in_child: called in the new process before the run begins.
    """

    def __init__(
        self,
        folder: Path,
        processes: int = 1,
        network: str | None = None,
        in_child: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.processes, self.network = folder, processes, network
        self.in_child = in_child
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None}

    def run(self) -> None:
        """Run until the run has ended.

        Raises:
            RuntimeError: if it failed, with the reason.
        """
        reason = ""
        for _ in range(RESTARTS + 1):
            self._process = start_process(
                self.folder, self.processes, self.network, preexec_fn=self.in_child
            )
            # `wait` would hold a lock that `stop`, called by a signal's handler, needs.
            while (code := self._process.poll()) is None:
                time.sleep(_EACH)
            if code == 0:
                return
            before, reason = reason, reason_in(self.folder, f"it ended with {code}")
            several = self.processes > 1 and reason != before and _STOPPED not in reason
            if code not in _DEATHS and not several:
                break
        raise RuntimeError(reason)

    def stop(self) -> None:
        """End the run, which writes a checkpoint; it is killed if that takes too long."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            self._process.kill()
