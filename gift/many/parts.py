"""A search as an array of jobs: each part runs trials one after another, all share the study."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gift.errors import JobError
from gift.jobs.models import Job
from gift.many.engines.local import Processes
from gift.many.searching import Found, search
from gift.many.settings import Search, objectives_of, read_search
from gift.many.study import Study
from gift.many.task import RESULT, SEARCH_FILE, read_result
from gift.support import yaml_files
from gift.support.atomic_files import write_text
from gift.support.optional import require

_SEARCH = "search"  # key in the result of a part


def parts_of(settled: Search) -> list[Job]:
    """Return the jobs of the parts of a search: as many as it has trials at a time.

    Args:
        settled: the search, anchored.

    Raises:
        JobError: if its objective cannot be reached.
        ImportError: if Optuna is not installed.
    """
    require("optuna", "search")
    job = settled.settled_job()
    objectives_of(settled, job)
    number = min(settled.parallel, settled.budget.trials or settled.parallel)
    folders = [Path(settled.folder) / "parts" / f"{n:02d}" for n in range(number)]
    return [job.model_copy(update={"folder": str(folder)}) for folder in folders]


def write_part(settled: Search, folder: Path) -> None:
    """Write the search into the folder of a part, where `run_part` reads it."""
    write_text(folder / SEARCH_FILE, yaml_files.dump(settled.model_dump(mode="json")))


def is_done(settled: Search, folder: Path) -> bool:
    """Return whether a part has come to the end of exactly this search."""
    found = read_result(folder) or {}
    return found.get(_SEARCH) == settled.model_dump(mode="json")


def run_part(folder: Path, network: str | None, tell: Callable[[str], None]) -> None:
    """Run the part of a search in a folder, or continue it.

    SIGTERM stops its trial, which writes a checkpoint; the next part to start continues it.

    Args:
        folder: folder of the part.
        network: ``import:package.module:function``, for a job that names no network.
        tell: called with a line for each trial that ends.
    """
    settled = read_search(folder / SEARCH_FILE)
    engine = Processes(1, network, settled.settled_job().resources.processes)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        found: Found | None = search(settled, network=network, engine=engine, tell=tell)
    except JobError:
        if not _others_run(settled):
            raise
        found = None
    finally:
        signal.signal(signal.SIGTERM, before)
    tell("other parts run the last trials" if found is None else f"\n{found}")
    content = {_SEARCH: settled.model_dump(mode="json")}
    write_text(folder / RESULT, json.dumps(content, indent=1) + "\n")


def _others_run(settled: Search) -> bool:
    study = Study(settled, objectives_of(settled, settled.settled_job()))
    return any(trial.state.name == "RUNNING" for trial in study.trials())


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
