"""The study of a search, kept by Optuna in a file that several processes share."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gift.errors import JobError
from gift.many.settings import OTHER_OBJECTIVES, Search, is_maximised
from gift.many.space import chosen, largest, space_of
from gift.support.optional import require

JOURNAL = "study.journal"
SETTINGS, CONSTRAINT, REASON = "settings", "constraint", "reason"
_NAME, _SEARCH = "gift", "search"
_ANY = ("progress", "tensorboard", "workers", "device")


@dataclass
class Trial:
    """A trial that this process takes care of.

    Args:
        number: its number in the study.
        settings: the settings that were chosen.
        asked: the trial of Optuna.
        lock: held as long as this process takes care of it; it is free once the process is gone.
        folder: folder of its run.
        reported: number of epochs that were reported.
    """

    number: int
    settings: dict[str, Any]
    asked: Any
    lock: FileLock
    folder: Path
    reported: int = 0
    handle: Any = field(default=None, repr=False)


class Study:
    """The trials of a search.

    Args:
        search: the search, anchored.
        objectives: names of the objectives.
    """

    def __init__(self, search: Search, objectives: Sequence[str]) -> None:
        self.search = search
        self.objectives = list(objectives)
        self.job = search.settled_job()
        self.space = space_of(search.vary)
        self.folder = Path(search.folder)
        self.trials_folder.mkdir(parents=True, exist_ok=True)
        self.optuna = require("optuna", "search")
        self._epochs = largest(self.space, "epochs", self.job.training.epochs)
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        journal = require("optuna.storages.journal", "search")
        with _quiet():
            file = journal.JournalFileBackend(str(self.folder / JOURNAL))
            self.storage = journal.JournalStorage(file)
        self.study = self._opened()

    @property
    def trials_folder(self) -> Path:
        """The folder of the runs."""
        return self.folder / "trials"

    @property
    def reports(self) -> bool:
        """Whether the value after each epoch is reported: Optuna takes one objective."""
        return len(self.objectives) == 1 and self.objectives[0] not in OTHER_OBJECTIVES

    @property
    def prunes(self) -> bool:
        """Whether poor trials are ended early."""
        several = self._epochs is None or self._epochs > 1  # None: as many as the data asks for
        return self.reports and self.search.pruner != "none" and several

    def trials(self) -> list[Any]:
        """Return all trials, those of other processes included."""
        return list(self.study.get_trials(deepcopy=False))

    def counted(self) -> int:
        """Return how many trials were begun; those beyond the budget of parameters do not count."""
        return sum(not t.user_attrs.get(CONSTRAINT) for t in self.trials())

    def adopted(self) -> Iterator[Trial]:
        """Yield the trials whose process is gone; this one now takes care of them."""
        running = self.optuna.trial.TrialState.RUNNING
        with self._asking():
            found = [t for t in self.trials() if t.state == running]
            locked = [(t, lock) for t in found if (lock := self._lock(t.number)) is not None]
        for frozen, lock in locked:
            with _quiet():
                study = self.storage.get_study_id_from_name(_NAME)
                number = self.storage.get_trial_id_from_study_id_trial_number(study, frozen.number)
                yield self._trial(self.optuna.trial.Trial(self.study, number), lock)

    def asked(self) -> Trial | None:
        """Return a new trial; None if other processes have begun the last ones."""
        with self._asking(), _quiet():
            begun = len(self.trials())
            # A sampler of its own for each trial, so that a search that goes on chooses what it
            # would have chosen.
            self.study.sampler = self._sampler(self.search.seed + begun)
            limit = self.search.budget.trials
            if limit is not None and self.counted() >= limit:
                return None
            trial = self.study.ask()
            lock = self._lock(trial.number)
            assert lock is not None, "a new trial is taken by another process"
            return self._trial(trial, lock)

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """Report the value after an epoch, and return whether the trial should end."""
        with _quiet():
            trial.asked.report(value, epoch)
            return bool(trial.asked.should_prune())

    def complete(self, trial: Trial, values: Sequence[float], notes: dict[str, Any]) -> None:
        """Tell what came of a trial.

        Args:
            trial: the trial.
            values: values of the objectives.
            notes: what else is kept of it.
        """
        for name, value in notes.items():
            trial.asked.set_user_attr(name, value)
        self._tell(trial, list(values))

    def prune(self, trial: Trial, reason: str, constraint: float = 0.0) -> None:
        """Tell that a trial ended early, or that it was not possible."""
        trial.asked.set_user_attr(REASON, reason)
        if constraint:
            trial.asked.set_user_attr(CONSTRAINT, [constraint])
        self._tell(trial, None, "PRUNED")

    def fail(self, trial: Trial, reason: str) -> None:
        """Tell that a trial failed."""
        trial.asked.set_user_attr(REASON, reason)
        self._tell(trial, None, "FAIL")

    def release(self, trial: Trial) -> None:
        """Leave a trial to whoever continues the search."""
        trial.lock.release()

    def _tell(self, trial: Trial, values: Any, state: str | None = None) -> None:
        made = None if state is None else getattr(self.optuna.trial.TrialState, state)
        with _quiet():
            self.study.tell(trial.asked, values, state=made, skip_if_finished=True)
        trial.lock.release()

    def _trial(self, trial: Any, lock: FileLock) -> Trial:
        known = trial.user_attrs.get(SETTINGS)
        if known is None:
            settings = chosen(self.space, trial, self.job)
            trial.set_user_attr(SETTINGS, json.dumps(settings))
        else:
            settings = json.loads(known)
        return Trial(trial.number, settings, trial, lock, self.run_folder(trial.number))

    def settings_of(self, trial: Any) -> dict[str, Any]:
        """Return the settings of a trial of Optuna."""
        known = trial.user_attrs.get(SETTINGS)
        return trial.params if known is None else json.loads(known)

    def best(self) -> list[Any]:
        """Return the best trial, or the trials of the front, if any are complete."""
        return list(self.study.best_trials) if len(self.objectives) > 1 else [self._best()]

    def _best(self) -> Any:
        complete = [t for t in self.trials() if t.state.name == "COMPLETE"]
        sign = -1 if is_maximised(self.objectives[0]) else 1
        return min(complete, key=lambda trial: (sign * trial.value, trial.number))

    def run_folder(self, number: int) -> Path:
        """Return the folder of the run of a trial."""
        return self.trials_folder / f"{number:04d}"

    def _lock(self, number: int) -> FileLock | None:
        lock = FileLock(self.trials_folder / f".{number:04d}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _asking(self) -> FileLock:
        return FileLock(self.folder / ".ask.lock")

    def _opened(self) -> Any:
        with self._asking(), _quiet():
            directions = ["maximize" if is_maximised(o) else "minimize" for o in self.objectives]
            study = self.optuna.create_study(
                study_name=_NAME, storage=self.storage, directions=directions, load_if_exists=True,
                sampler=self._sampler(self.search.seed), pruner=self._pruner(),
            )  # fmt: skip
            said = json.dumps(self._identity(), sort_keys=True)
            before = study.user_attrs.get(_SEARCH)
            if before is None:
                study.set_metric_names(self.objectives)
                study.set_user_attr(_SEARCH, said)
            elif before != said:
                then, now = json.loads(before), self._identity()
                problems = [f"{name} is another one" for name in now if now[name] != then[name]]
                what = f"{self.folder} has another search; choose another folder"
                raise JobError(what, problems)
        return study

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same when a search continues."""
        job = self.job.to_config()
        training = {k: v for k, v in job.pop("training").items() if k not in _ANY}
        named = {name: getattr(self.search, name) for name in ("vary", "sampler", "pruner", "seed")}
        del job["folder"]
        plain = {"job": {**job, "training": training}, "objective": self.objectives, **named}
        return json.loads(json.dumps(plain))

    def _sampler(self, seed: int) -> Any:
        samplers = self.optuna.samplers
        if self.search.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if self.search.sampler == "gp":
            require("scipy", "search")
            return samplers.GPSampler(seed=seed, constraints_func=_constraints)
        return samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=self.search.parallel > 1,
            constraints_func=_constraints, warn_independent_sampling=False,
        )  # fmt: skip

    def _pruner(self) -> Any:
        pruners = self.optuna.pruners
        if not self.prunes:
            return pruners.NopPruner()
        if self.search.pruner == "median":
            return pruners.MedianPruner()
        most = "auto" if self._epochs is None else self._epochs
        return pruners.HyperbandPruner(min_resource=1, max_resource=most)


def _constraints(trial: Any) -> list[float]:
    return trial.user_attrs.get(CONSTRAINT, [0.0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without warnings that parts of Optuna are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
