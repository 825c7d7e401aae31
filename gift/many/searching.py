"""`search`: many runs of one job, whose settings Optuna chooses."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gift.errors import JobError
from gift.jobs.models import Job
from gift.jobs.reading import checked, write_job
from gift.jobs.runs import JOB
from gift.many.costs import Costs
from gift.many.engines.base import Engine, State
from gift.many.engines.local import Here, Processes
from gift.many.history import reported_values
from gift.many.networks import counted_network
from gift.many.pages import write_search_report
from gift.many.settings import Search, objectives_of, read_search, value_of
from gift.many.study import Study, Trial
from gift.many.task import finished, read_task, write_task
from gift.many.variants import BUDGET, in_words, varied
from gift.support.atomic_files import write_text
from gift.support.csv_text import csv_text

_EACH = 0.2  # seconds between two looks at the trials that are running
_MOST_FAILURES = 3  # a search of which nothing else came is ended


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        folder: folder of the search.
        objectives: names of the objectives.
        best: the best settings; for several objectives those of each trial of the front.
        values: values of the objectives, for each of `best`.
        jobs: job files of `best`, ready to run.
        runs: folders of the runs of `best`, which have been trained already.
        trials: number of trials: complete, pruned, failed.
        report: the report.
    """

    folder: Path
    objectives: tuple[str, ...]
    best: list[dict[str, Any]]
    values: list[tuple[float, ...]]
    jobs: list[Path]
    runs: list[Path]
    trials: dict[str, int]
    report: Path = field(repr=False)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.trials.items() if count)
        lines = [f"{sum(self.trials.values())} trials: {counts}"]
        several = len(self.objectives) > 1
        for settings, values, job, run in zip(
            self.best, self.values, self.jobs, self.runs, strict=True
        ):
            reached = ", ".join(
                f"{name} {value:.6g}" for name, value in zip(self.objectives, values, strict=True)
            )
            what = "of the front" if several else "best"
            lines.append(f"{what}: {reached}, with {in_words(settings)}\n  {job}, trained in {run}")
        return "\n".join([*lines, f"report: {self.report}"])


def search(
    given: str | Path | Mapping[str, Any] | Search,
    *,
    network: Callable[[], Any] | str | None = None,
    engine: Engine | None = None,
    tell: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Found:
    """Search for the best settings of a job; Optuna chooses what is tried.

    The study is kept in ``study.journal`` in the folder of the search. Several processes may call
    this with one folder and share its trials. If they are killed, the same call continues: trials
    that were running resume from their checkpoints. ``optuna-dashboard study.journal`` shows the
    study in a browser.

    Args:
        given: a search file, its content, or a `gift.many.Search`.
        network: for jobs that name no network: a function that returns a new one, in which case
            trials run in this process, one at a time; or ``import:package.module:function``, which
            the processes of trials call.
        engine: where trials run; None starts processes on this machine.
        tell: called with a line for each trial that ends.
        changes: settings that override those of the file, such as ``parallel=4``.

    Returns:
        What was found; it prints as a summary. The folder gets ``best.yaml``, or ``front-*.yaml``
        for several objectives, ``trials.csv``, ``report.html`` and, in ``trials``, the folder of
        each run.

    Raises:
        JobError: naming everything that is wrong with the file; or if the first trials all fail.
        ImportError: if Optuna is not installed.
    """
    settled = _settled(given, changes)
    job = settled.settled_job()
    if job.network is None and network is None:
        raise JobError("the job names no network", ["network: name one, or give it"])
    study = Study(settled, objectives_of(settled, job))
    if engine is None:
        engine = Here(network) if callable(network) else Processes(settled.parallel, network)
    costs = Costs(counted_network(network))
    running: list[Trial] = []
    at_work = _Work(study, engine, costs, running, tell)
    try:
        at_work.until_done(settled)
    except BaseException:
        for trial in running:  # they are left as running, and resumed by the same call
            engine.stop(trial.handle)
            study.release(trial)
        raise
    return conclude(study)


def _settled(given: Any, changes: dict[str, Any]) -> Search:
    if isinstance(given, str | Path):
        return read_search(given, changes)
    if isinstance(given, Search):
        given = given.model_dump()
    given = {**given, **{name: value for name, value in changes.items() if value is not None}}
    return checked(Search, given, "the search").anchored(Path.cwd())


@dataclass
class _Work:
    """The trials of this process, from their beginning to their end."""

    study: Study
    engine: Engine
    costs: Costs
    running: list[Trial]
    tell: Callable[[str], None]
    failures: list[str] = field(default_factory=list)
    successes: int = 0

    def until_done(self, search: Search) -> None:
        """Begin trials while the budget allows, and attend to them until all have ended."""
        ends = (
            None if search.budget.hours is None else time.monotonic() + search.budget.hours * 3600
        )
        for trial in self.study.adopted():
            self.tell(f"trial {trial.number} goes on: {in_words(trial.settings)}")
            self.begin(trial)
        more = True
        while more or self.running:
            slots = search.parallel if self.engine.slots is None else self.engine.slots
            while more and len(self.running) < slots:
                more = ends is None or time.monotonic() < ends
                asked = self.study.asked() if more else None
                more = asked is not None
                if asked is not None:
                    self.begin(asked)
            for trial in list(self.running):
                self.attend(trial)
            if self.running:
                time.sleep(_EACH)

    def begin(self, trial: Trial) -> None:
        """Start the run of a trial, if it is possible."""
        limit = self.study.search.budget.parameters
        try:
            job = varied(self.study.job, trial.settings)
            job = job.model_copy(update={"folder": str(trial.folder)})
            if BUDGET in trial.settings:
                job = self.costs.sized(job, trial.settings[BUDGET])
            if limit is not None and (excess := self.costs.excess(job, limit)):
                reason = f"it trains {self.costs.of(job).parameters:,} parameters"
                self.tell(f"trial {trial.number} is beyond the budget: {reason}")
                self.study.prune(trial, reason, excess)
                return
        except (ValueError, TypeError) as error:  # what does not fit the network
            self.failed(trial, str(error))
            return
        if finished(job) is None:
            trial.handle = self.engine.start(write_task(job))
            self.running.append(trial)
        else:
            self.completed(trial, job)

    def attend(self, trial: Trial) -> None:
        """Report the epochs of a trial, and conclude it if it has ended or should."""
        state = self.engine.state(trial.handle)
        if self.study.reports:
            metric = self.study.objectives[0]
            for epoch, value in reported_values(trial.folder, metric, trial.reported):
                trial.reported = epoch
                if self.study.report(trial, epoch, value) and not state.is_over:
                    self.engine.stop(trial.handle)
                    self.running.remove(trial)
                    self.study.prune(trial, f"it was poor after epoch {epoch}")
                    self.tell(f"trial {trial.number} was ended after epoch {epoch}: {metric} "
                              f"{value:.4g}, {in_words(trial.settings)}")  # fmt: skip
                    return
        if not state.is_over:
            return
        self.running.remove(trial)
        if state is State.DONE and (trial.folder / JOB).is_file():
            self.completed(trial, read_task(trial.folder))
        else:
            self.failed(trial, self.engine.reason(trial.handle))

    def completed(self, trial: Trial, job: Job) -> None:
        """Tell the study what came of a trial."""
        result = finished(job)
        values = [] if result is None else [value_of(o, result) for o in self.study.objectives]
        if result is None or None in values:
            self.failed(trial, "it has no result")
            return
        notes = {name: result[name] for name in ("trained", "megabytes", "seconds", "best_epoch")}
        notes["metrics"] = result["after"]
        self.study.complete(trial, [float(v) for v in values if v is not None], notes)
        self.successes += 1
        reached = ", ".join(
            f"{name} {value:.4g}" for name, value in zip(self.study.objectives, values, strict=True)
        )
        self.tell(f"trial {trial.number}: {reached}, {in_words(trial.settings)}")

    def failed(self, trial: Trial, reason: str) -> None:
        """Tell the study that a trial failed; end the search if nothing else ever happens."""
        self.study.fail(trial, reason)
        self.tell(f"trial {trial.number} failed ({in_words(trial.settings)}): {reason}")
        self.failures.append(f"{in_words(trial.settings)}: {reason}")
        if not self.successes and len(self.failures) >= _MOST_FAILURES:
            raise JobError("the first trials all failed", self.failures)


def conclude(study: Study) -> Found:
    """Write the best job, the table of trials and the report, and return what was found.

    Raises:
        JobError: if no trial was completed.
    """
    states = [trial.state.name.lower() for trial in study.trials()]
    names = ("complete", "pruned", "fail", "running")
    counts = {name: states.count(name) for name in names}
    counts = {"failed" if name == "fail" else name: n for name, n in counts.items()}
    write_text(study.folder / "trials.csv", _table(study))
    if not counts["complete"]:
        reasons = [str(t.user_attrs.get("reason", "")) for t in study.trials()]
        raise JobError("no trial was completed", [r for r in dict.fromkeys(reasons) if r][:5])
    best = sorted(study.best(), key=lambda trial: trial.number)
    jobs, runs, settings = [], [], []
    for trial in best:
        run = study.run_folder(trial.number)
        several = len(study.objectives) > 1
        name = f"front-{trial.number:04d}" if several else "best"
        file = study.folder / f"{name}.yaml"
        write_job(read_task(run).model_copy(update={"folder": str(study.folder / name)}), file)
        jobs.append(file)
        runs.append(run)
        settings.append(study.settings_of(trial))
    report = write_search_report(study, best)
    values = [tuple(trial.values) for trial in best]
    return Found(
        study.folder, tuple(study.objectives), settings, values, jobs, runs, counts, report
    )


def _table(study: Study) -> str:
    """Return all trials as CSV."""
    names = [parameter.name for parameter in study.space]
    notes = ["trained", "megabytes", "seconds", "reason"]
    columns = ["trial", "state", *study.objectives, *names]
    columns += [note for note in notes if note not in columns]
    rows = []
    for trial in study.trials():
        values = dict(zip(study.objectives, trial.values or (), strict=False))
        own = study.settings_of(trial)
        known = {note: trial.user_attrs.get(note, "") for note in notes}
        row = {"trial": trial.number, "state": trial.state.name.lower()}
        rows.append({**known, **own, **values, **row})
    return csv_text(columns, rows)
