"""`submit`: jobs that a cluster runs, and what has become of them."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gift.errors import JobError, refuse
from gift.jobs.models import Job
from gift.jobs.reading import read_job, read_yaml
from gift.jobs.runs import JOB
from gift.many import parts
from gift.many.batch import task_folder
from gift.many.engines.base import JOB_FILE, SEARCH_FILE, Listed, State
from gift.many.history import progress_of
from gift.many.settings import Search, read_search
from gift.many.task import ERROR, LOG, finished, read_result
from gift.support.atomic_files import write_text
from gift.training.checkpoint import FILE

ENGINES = ("ray", "slurm")
_STATE = "GIFT_STATE"


@dataclass(frozen=True)
class Submission:
    """A run that was given to an engine.

    Args:
        id: what the engine calls it.
        engine: name of the engine.
        folder: folder of the run.
        options: options of the engine, see `engine_of`.
        network: ``import:package.module:function``, for a job that names no network.
    """

    id: str
    engine: str
    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    network: str | None = None


def engine_of(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    network: str | None = None,
) -> Any:
    """Return an engine.

    Args:
        name: "ray" or "slurm".
        options: by name: ``address`` of a cluster of Ray; options of ``sbatch``.
        network: ``import:package.module:function``, for jobs that name no network.

    Raises:
        JobError: if there is no such engine.
    """
    if name == "slurm":
        from gift.many.engines.slurm_cluster import Slurm

        return Slurm(options, network)
    if name == "ray":
        from gift.many.engines.ray_cluster import Ray

        return Ray(options, network)
    raise JobError(f"there is no engine {name!r}", [f"expected one of {', '.join(ENGINES)}"])


def submit(paths: Sequence[str | Path], engine: Any) -> list[Submission]:
    """Queue jobs and searches; what is done, queued or running already is not queued again.

    A search is queued as ``parallel`` jobs, which share its study: each runs trials one after
    another, within the resources of the job.

    Nothing is sent but the job: the nodes must see the folder of the run, the data and this Python
    under the same paths.

    Args:
        paths: job files and search files, and folders of them.
        engine: see `engine_of`.

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
        _remember(made[-1])
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
        folder = task_folder(self.job)
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


def state_folder() -> Path:
    """Return the folder in which submissions are remembered, ``GIFT_STATE`` or that of the user."""
    if own := os.environ.get(_STATE):
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "gift"


def _remember(one: Submission) -> None:
    name = f"{one.engine}-{one.id}.json".replace("/", "-")
    write_text(state_folder() / name, json.dumps(asdict(one)) + "\n")


def remembered() -> list[Submission]:
    """Return what was submitted from this machine, oldest first."""
    found = []
    for file in sorted(state_folder().glob("*.json"), key=lambda file: file.stat().st_mtime):
        try:
            found.append(Submission(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return found


def jobs(engines: Sequence[Any] | None = None) -> tuple[list[Listed], list[str]]:
    """Return all runs with their states, as the engines say them, and which engines are silent.

    A run that its engine has forgotten has the state that its folder shows.

    Args:
        engines: the engines to ask; None asks those of the runs that are remembered.
    """
    known = remembered()
    if engines is None:
        places = {(one.engine, one.options.get("address")): one for one in known}
        engines = [of_submission(one) for one in places.values()]
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


def found(name: str) -> Submission:
    """Return a submission by its id or by the folder of its run; the newest, if there are several.

    Raises:
        JobError: if there is none.
    """
    place = str(Path(name).expanduser().resolve())
    own = [one for one in remembered() if name == one.id or place == one.folder]
    if not own:
        known = ", ".join(one.id for one in remembered()[-5:]) or "none"
        raise JobError(f"nothing was submitted as {name}", [f"the last ones are: {known}"])
    return own[-1]


def of_submission(one: Submission) -> Any:
    """Return the engine of a submission."""
    return engine_of(one.engine, options=one.options, network=one.network)


def cancel(name: str) -> Submission:
    """Cancel a run and wait until it has ended; see `found`."""
    one = found(name)
    of_submission(one).stop(one.id)
    return one


def resume(name: str, options: Mapping[str, Any] | None = None) -> Submission:
    """Queue a run again, which goes on from its checkpoint; see `found`.

    Raises:
        JobError: if it is done.
    """
    one = found(name)
    job = read_job(Path(one.folder) / JOB_FILE)
    if finished(job) is not None:
        raise JobError(f"{one.folder} is done", ["there is nothing to go on with"])
    settled = replace(one, options={**one.options, **(options or {})})
    again = replace(settled, id=of_submission(settled).start(Path(one.folder)))
    _remember(again)
    return again


def fetch(name: str, to: str | Path) -> list[Path]:
    """Copy the results of a run, without its checkpoint, and return the files.

    Raises:
        JobError: if there are none yet, or the folder is there already.
    """
    source, target = Path(found(name).folder), Path(to).expanduser()
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
    """Return the file with what a run prints; see `found`."""
    return Path(found(name).folder) / LOG
