"""Running a job."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from gift.data import Examples
from gift.errors import JobError
from gift.jobs.errors import shown
from gift.jobs.examples import job_examples, job_reader
from gift.jobs.heads import warn_of_fresh, with_head
from gift.jobs.models import Job
from gift.jobs.networks import job_network, remember_code
from gift.jobs.reading import checked, read_yaml, write_job
from gift.jobs.runs import INPUTS, JOB, inputs_text
from gift.jobs.teachers import job_teacher
from gift.schedules import Schedule
from gift.strategies import FineTuningStrategy
from gift.strategies.classic import new_heads
from gift.support.atomic_files import write_text
from gift.training import Callback, LearningRates, Result, find_lr, finetune
from gift.training.checkpoint import FILE
from gift.training.distributed import rank
from gift.zoo import LoadedNetwork

_NOT_GIVEN = object()


def run_job(
    job: Job,
    network: Any = None,
    restart: bool = False,
    accept_changed_data: bool = False,
    code: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Run a job, or resume it if its folder has a run that was stopped.

    In addition to the files of `gift.training.finetune`, the folder gets ``job.yaml``, the job
    with every setting, and ``inputs.json``, the classes and how inputs are read: see
    `gift.jobs.Run`.

    Args:
        job: the job.
        network: replaces the network that the job names: a module, or what `gift.zoo.load_network`
            returns.
        restart: whether to start from scratch even if the folder has a run.
        accept_changed_data: whether to resume although the examples changed, or are read in
            another way.
        code: name of the function that made `network`, ``import:module:function``; the folder
            remembers it for ``--allow-import``.
        callbacks: see `gift.training.finetune`.

    Raises:
        JobError: if the job names no network, or the folder has a run of another job.
        DataError: if examples cannot be read.
        TrainingError: if network, examples and settings do not fit each other.
    """
    job = job.anchored(Path.cwd())
    folder = Path(job.folder)
    if not restart and (folder / FILE).is_file():
        _refuse_another(job, folder, accept_changed_data)
    parts = _parts_of(job, network)
    loaded, train = parts.loaded, parts.train
    is_named = network is None and not _is_random(job, network)
    if train.task == "regression" and is_named and not any(new_heads(parts.strategy)):
        train = replace(train, details={})  # the head that is kept gives the numbers themselves
    teacher = job_teacher(job, train)

    def write() -> None:
        warn_of_fresh(loaded)
        if rank() == 0:  # with torchrun, only the first process writes
            write_job(job, folder / JOB)
            write_text(folder / INPUTS, inputs_text(train, train.reader, folder))
            remember_code(folder, code)

    return finetune(
        loaded.net, train, parts.valid, strategy=parts.strategy, schedule=parts.schedule,
        old=parts.old, folder=folder, restart=restart, begin=write, teacher=teacher,
        accept_changed_data=accept_changed_data, callbacks=callbacks, about=_places(job),
        **parts.settings,
    )  # fmt: skip


def find_lr_of(job: Job, network: Any = None, steps: int = 100) -> LearningRates:
    """Run `gift.training.find_lr` with what a job says; nothing is written.

    Args:
        job: the job.
        network: see `run_job`.
        steps: number of learning rates to try.
    """
    parts = _parts_of(job.anchored(Path.cwd()), network)
    return find_lr(
        parts.loaded.net, parts.train, strategy=parts.strategy, schedule=parts.schedule,
        steps=steps, **parts.settings,
    )  # fmt: skip


class _JobParts(NamedTuple):
    """The parts of a run that a job names."""

    loaded: LoadedNetwork
    train: Examples
    valid: Examples | None
    old: Examples | None
    strategy: FineTuningStrategy
    schedule: Schedule | None
    settings: dict[str, Any]


def _parts_of(job: Job, network: Any) -> _JobParts:
    """Make the parts that a job names; `network` as in `run_job`."""
    loaded = job_network(job, network)
    reader = job_reader(job.data, loaded.reader)
    train, valid, old = job_examples(job.data, reader, job.training.seed or 0)
    return _JobParts(
        loaded, train, valid, old,
        strategy=with_head(job.strategy, loaded, train, _is_random(job, network)),
        schedule=None if job.schedule is None else job.schedule.made(),
        settings={field.name: getattr(job.training, field.name) for field in fields(job.training)},
    )  # fmt: skip


def _is_random(job: Job, network: Any) -> bool:
    """Whether the job asks for a network with random weights."""
    return network is None and job.network is not None and job.network.weights is None


def _refuse_another(job: Job, folder: Path, accept_changed_data: bool) -> None:
    if not (folder / JOB).is_file():
        return
    data, lines = read_yaml(folder / JOB)
    before = checked(Job, data, str(folder / JOB), lines).to_config()
    now = job.to_config()
    # `training` is compared with the checkpoint.
    kept = ["data"] * (not accept_changed_data)
    parts = ("network", *kept, "strategy", "schedule", "teacher")
    if problems := [text for part in parts for text in _differences(part, before[part], now[part])]:
        advice = "choose another folder, or start over (--restart, restart=True)"
        raise JobError(f"{folder} has the run of another job; {advice}", problems)


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield the differences between plain data, each with its place."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            sides = [side.get(key, _NOT_GIVEN) for side in (before, now)]
            yield from _differences(f"{name}.{key}", *sides)
    elif before != now:
        values = ["not given" if v is _NOT_GIVEN else shown(v) for v in (before, now)]
        yield f"{name} was {values[0]} and is {values[1]}"


def _places(job: Job) -> dict[str, str]:
    """Return where the examples are, and how they are stored, for the report."""
    places = {"Training examples": job.data.train, "Validation examples": job.data.valid,
              "Old task": job.data.old}  # fmt: skip
    found = {name: shown(place) for name, place in places.items() if place is not None}
    if job.data.valid_share is not None:
        found["Validation examples"] = f"{job.data.valid_share:.0%} of the training examples"
    return {"Kind of examples": job.data.kind, **found}
