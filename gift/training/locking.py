"""One run at a time in a folder."""

from pathlib import Path
from typing import Any

from gift.errors import TrainingError
from gift.support.optional import require
from gift.training.distributed import Processes

LOCK = ".lock"


class FolderLock:
    """The lock of the folder of a run, which the operating system releases with the process.

    Args:
        folder: the folder; None locks nothing.
        processes: the processes that train together, the first of which has the lock.
    """

    def __init__(self, folder: Path | None, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self._lock: Any = None

    def take(self) -> None:
        """Take the lock, unless it was taken before; all processes must call this.

        Raises:
            TrainingError: if another run has it.
        """
        problem = ""
        if self.folder is not None and self.processes.first and self._lock is None:
            problem = self._taken(self.folder)
        problem = self.processes.gathered(problem)[0]
        if problem:
            raise TrainingError(problem)

    def _taken(self, folder: Path) -> str:
        filelock = require("filelock", "train")
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return (
                f"another run trains in {folder} at this moment: wait until it ends, or choose "
                "another folder"
            )
        except NotImplementedError:
            return ""  # this file system has no locks
        self._lock = lock
        return ""

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
