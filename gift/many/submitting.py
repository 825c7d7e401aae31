"""`submit`: jobs that a cluster runs, their states and their results."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gift.errors import JobError, refuse
from gift.jobs.models import Job
from gift.jobs.reading import read_job, read_yaml
from gift.jobs.runs import JOB
from gift.many import parts
from gift.many.engines.base import Listed, State
from gift.many.engines.scheduler import Scheduler
from gift.many.history import progress_of
from gift.many.settings import Search, read_search
from gift.many.submissions import Submission, engine_for, find, remember, remembered
from gift.many.task import ERROR, LOG, SEARCH_FILE, finished, read_result, read_task, write_task
from gift.training.checkpoint import FILE


def submit(paths: Sequence[str | Path], engine: Scheduler) -> list[Submission]:
    """Queue jobs and searches; what is done, queued or running already is not queued again.

    A search is queued as ``parallel`` jobs, which share its study: each runs trials one after
    another, within the resources of the job.

    Nothing is sent but the job: the nodes must see the folder of the run, the data and this Python
    under the same paths.

    Args:
        paths: job files and search files, and folders of them.
        engine: see `gift.many.submissions.engine_of`.

    Raises:
        JobError: naming everything that would keep a job from running; nothing is queued then.
    """
    found, problems = _found(paths)
    network = engine.network
    for one in found:
        problems += [f"{one.file}: {problem}" for problem in _missing(one.job, network)]
    folders = [one.job.folder for one in found]
    problems += [f"{f}: several jobs have this folder" for f in dict.fromkeys(folders)
                 if folders.count(f) > 1]  # fmt: skip
    problems += engine.problems([one.job for one in found])
    refuse(JobError, "nothing was queued", list(dict.fromkeys(problems)))
    places = [one.written() for one in found if not one.is_done()]
    made = []
    for place, number in zip(places, engine.start_all(places), strict=True):
        made.append(Submission(number, engine.name, str(place), dict(engine.options), network))
        remember(made[-1])
    return made


@dataclass(frozen=True)
class _Given:
    """A job that is to be queued, which may be a part of a search."""

    file: Path
    job: Job
    search: Search | None = None

    def is_done(self) -> bool:
        if self.search is not None:
            return parts.is_done(self.search, Path(self.job.folder))
        return finished(self.job) is not None

    def written(self) -> Path:
        """Write it into its folder, and return the folder."""
        folder = write_task(self.job)
        if self.search is not None:
            parts.write_part(self.search, folder)
        return folder


def _found(paths: Iterable[str | Path]) -> tuple[list[_Given], list[str]]:
    """Return the jobs in files and folders, and what is wrong with others."""
    found: dict[Path, list[_Given]] = {}
    problems: list[str] = []
    for given in map(Path, paths):
        path = given.expanduser()
        files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
        if not files:
            problems.append(f"{path} has no job files (*.yaml)")
        for file in files:
            try:
                found[file] = _read(file)
            except (JobError, FileNotFoundError, ImportError) as error:
                problems.append(str(error))
    return [one for several in found.values() for one in several], problems


def _read(file: Path) -> list[_Given]:
    data, _ = read_yaml(file)
    if not isinstance(data, dict) or "vary" not in data:
        return [_Given(file, read_job(file))]
    search = read_search(file)
    return [_Given(file, job, search) for job in parts.parts_of(search)]


def _missing(job: Job, network: str | None) -> Iterator[str]:
    """Yield what a job needs and this machine does not have."""
    if job.network is None and network is None:
        yield "network: name one, or give it with --network"
    for part in ("train", "valid", "old"):
        for value in (getattr(job.data, part) or {}).values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str) and os.path.isabs(one) and not Path(one).exists():
                    yield f"data.{part}: there is no {one}"
    folder = Path(job.folder)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield f"folder: nothing can be written into {there}"


def jobs(engines: Sequence[Scheduler] | None = None) -> tuple[list[Listed], list[str]]:
    """Return all runs with their states, as the engines say them, and which engines are silent.

    A run that its engine has forgotten has the state that its folder shows.

    Args:
        engines: the engines to ask; None asks those of the runs that are remembered.
    """
    known = remembered()
    if engines is None:
        places = {(one.engine, one.options.get("address")): one for one in known}
        engines = [engine_for(one) for one in places.values()]
    rows: dict[tuple[str, str], Listed] = {}
    silent: list[str] = []
    answered: set[tuple[str, Any]] = set()
    for engine in engines:
        try:
            found = engine.listed()
        except (JobError, ImportError) as error:
            silent.append(f"{engine.name}: {error}")
            continue
        answered.add((engine.name, engine.options.get("address")))
        rows |= {(one.engine, one.id): one for one in found}
    for one in known:
        key = (one.engine, one.id)
        if key not in rows:
            heard = (one.engine, one.options.get("address")) in answered
            rows[key] = Listed(one.id, one.engine, *_by_folder(Path(one.folder), heard))
        elif rows[key].folder is None:
            rows[key] = replace(rows[key], folder=Path(one.folder))
    return list(rows.values()), silent


def _by_folder(folder: Path, heard: bool) -> tuple[State, Path, str, str]:
    """Return what the folder of a run says of its state."""
    if read_result(folder) is not None:
        return State.DONE, folder, "", "by its folder"
    if (folder / ERROR).is_file():
        return State.FAILED, folder, "", "by its folder"
    note = "its engine does not know it" if heard else "its engine does not answer"
    return State.UNKNOWN, folder, "", note


def table(rows: Sequence[Listed]) -> str:
    """Format runs as a table."""
    cells = [
        (r.engine, r.id, r.state, r.elapsed, progress_of(r.folder), str(r.folder or ""), r.note)
        for r in rows
    ]
    header = ["engine", "id", "state", "time", "progress", "folder", "note"]
    return tabulate(cells, headers=header, disable_numparse=True)


def cancel(name: str) -> Submission:
    """Cancel a run and wait until it has ended; see `gift.many.submissions.find`."""
    one = find(name)
    engine_for(one).stop(one.id)
    return one


def resume(name: str, options: Mapping[str, Any] | None = None) -> Submission:
    """Queue a run again, which continues from its checkpoint; see `gift.many.submissions.find`.

    Raises:
        JobError: if it is done.
    """
    one = find(name)
    job = read_task(Path(one.folder))
    if finished(job) is not None:
        raise JobError(f"{one.folder} is done", ["there is nothing to continue"])
    settled = replace(one, options={**one.options, **(options or {})})
    again = replace(settled, id=engine_for(settled).start(Path(one.folder)))
    remember(again)
    return again


def fetch(name: str, to: str | Path) -> list[Path]:
    """Copy the results of a run, without its checkpoint, and return the files.

    Raises:
        JobError: if there are none yet, or the folder is there already.
    """
    source, target = Path(find(name).folder), Path(to).expanduser()
    if (source / SEARCH_FILE).is_file():
        source = source.parents[1]  # that of the search, of which this is a part
    if not any((source / name).is_file() for name in (JOB, "trials.csv")):
        raise JobError(f"{source} has no results yet", ["gift jobs shows its state"])
    if target.exists():
        raise JobError(f"{target} is there already", ["choose another folder"])
    left_out = shutil.ignore_patterns(FILE, "slurm", ".*", "*.tmp")
    shutil.copytree(source, target, ignore=left_out)
    return sorted(path for path in target.rglob("*") if path.is_file())


def log_of(name: str) -> Path:
    """Return the file with what a run prints; see `gift.many.submissions.find`."""
    return Path(find(name).folder) / LOG
