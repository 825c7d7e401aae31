"""Search files: what varies, the budget, the objectives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gift.budget.budget import Budget
from gift.errors import JobError
from gift.jobs.errors import hint
from gift.jobs.kinds import anchored
from gift.jobs.models import Filled, Job, Section
from gift.jobs.reading import checked, read_job, read_yaml
from gift.many.space import space_of
from gift.many.task import is_higher_better, watched
from gift.training.metrics import METRICS, metrics_of

OTHER_OBJECTIVES = {
    "parameters": "trained parameters",
    "megabytes": "size of the delta's file",
    "seconds": "time of all epochs",
    "step_seconds": "time of a step",
    "peak_memory": "peak memory in bytes",
    "forgetting": "how much worse the old task becomes",
}
"""What a search can minimise besides the metrics of the task."""


class Limits(Section):
    """When a search ends, and which trials are possible.

    Args:
        trials: number of trials, those of all processes and earlier calls included.
        hours: no trial begins after this time of one call.
        parameters: budget of gift.suggest for each trial, such as 100k, 1% or 2MB; trials beyond it
            are not run.
    """

    trials: int | None = Field(default=None, ge=1)
    hours: float | None = Field(default=None, gt=0)
    parameters: int | float | str | None = None

    @field_validator("parameters")
    @classmethod
    def _is_budget(cls, given: Any) -> Any:
        if given is not None:
            Budget.of(given, 1)
        return given


class Search(Section):
    """A search: a job, what may vary in it, and what is best.

    Args:
        job: a job file, or the content of one.
        vary: for each setting a list of values, or low, high, log and step; when has conditions.
        budget: when the search ends.
        objective: a metric of the task, parameters, megabytes, seconds, step_seconds, peak_memory
            or forgetting; several in a list give a front. Null is the metric that the job watches.
        sampler: "tpe", "gp" or "random".
        pruner: "hyperband" or "median" ends poor trials early, "none" none; several objectives have
            none.
        seed: seed of the sampler.
        parallel: number of trials at a time.
        folder: folder for the study, the trials, the best job and the report.
    """

    job: str | dict[str, Any]
    vary: dict[str, Any] = Field(min_length=1)
    budget: Filled[Limits] = Limits()
    objective: str | list[str] | None = None
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Literal["hyperband", "median", "none"] = "hyperband"
    seed: int = 0
    parallel: int = Field(1, ge=1)
    folder: str = "search"

    @field_validator("vary")
    @classmethod
    def _varies(cls, vary: dict[str, Any]) -> dict[str, Any]:
        space_of(vary)
        return vary

    @field_validator("objective")
    @classmethod
    def _is_known(cls, objective: Any) -> Any:
        known = ["loss", *{name: 0 for own in METRICS.values() for name in own}, *OTHER_OBJECTIVES]
        names = [objective] if isinstance(objective, str) else objective or []
        wrong = [f"there is no {n!r}, {hint(n, known)}" for n in names if n not in known]
        if wrong or (isinstance(objective, list) and not objective):
            raise ValueError("; ".join(wrong) or "the list is empty")
        if len({*names}) < len(names):
            raise ValueError("one is listed twice")
        return objective

    @model_validator(mode="after")
    def _ends(self) -> "Search":
        if self.budget.trials is None and self.budget.hours is None:
            raise ValueError("budget: give trials, hours or both")
        return self

    def anchored(self, base: Path) -> "Search":
        """Return the search with paths resolved from a folder, and the job read from its file."""
        if isinstance(self.job, str):
            job = read_job(base / Path(self.job).expanduser())
        else:
            job = checked(Job, self.job, "the job of the search").anchored(base)
        update = {"job": job.to_config(), "folder": anchored(self.folder, base)}
        return self.model_copy(update=update)

    def settled_job(self) -> Job:
        """Return the job of an anchored search."""
        return checked(Job, self.job, "the job of the search")


def read_search(path: str | Path, changes: Mapping[str, Any] | None = None) -> Search:
    """Read a search from a YAML file; paths in it are relative to its folder.

    Args:
        path: path of the file.
        changes: settings that override those of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        JobError: naming everything that is wrong.
    """
    path = Path(path).expanduser()
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise JobError(f"{path} is not a search", ["expected job, vary and budget"])
    data |= {name: value for name, value in (changes or {}).items() if value is not None}
    return checked(Search, data, str(path), lines).anchored(path.resolve().parent)


def objectives_of(search: Search, job: Job) -> list[str]:
    """Return the names of the objectives.

    Raises:
        JobError: if the runs of the job will not have one.
    """
    task = job.data.task
    given = search.objective
    names = [given] if isinstance(given, str) else given or [watched(job, task)]
    problems = []
    computed = {"loss", *metrics_of(task, job.training.metrics)}
    no_valid = job.data.valid is None and job.data.valid_share is None
    for name in names:
        if name == "forgetting" and job.data.old is None:
            problems.append("forgetting: the job has no data.old")
        elif name not in OTHER_OBJECTIVES and no_valid:
            problems.append(f"{name}: the job has no validation examples (data.valid)")
        elif name not in OTHER_OBJECTIVES and name not in computed:
            problems.append(f"{name}: it is not computed, add it to training.metrics of the job")
    if problems:
        raise JobError("the objective cannot be reached", problems)
    return names


def value_of(objective: str, result: Mapping[str, Any]) -> float | None:
    """Return the value of an objective in what `gift.many.task.run_task` wrote."""
    if objective == "parameters":
        return result.get("trained")
    return result.get(objective) if objective in OTHER_OBJECTIVES else result["after"][objective]


def is_maximised(objective: str) -> bool:
    """Return whether a higher value of an objective is better."""
    return objective not in OTHER_OBJECTIVES and is_higher_better(objective)
