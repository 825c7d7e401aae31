"""Experiment trackers (Weights & Biases, MLflow, Trackio and others), by those of accelerate."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gift.errors import TrainingError, closest
from gift.support.atomic_files import write_text
from gift.support.optional import require
from gift.training.callbacks import Callback, Row

if TYPE_CHECKING:
    from gift.training.run import TrainingRun

EVERY = 10
"""Number of optimizer steps between two values, since some trackers wait for a server."""

FILE = "trackers.json"
_OWN = "tensorboard"  # gift writes its events itself, so that a resumed run shows as one

_Options = Callable[[str, Path, str | None], dict[str, Any]]
_OPTIONS: Mapping[str, _Options] = {
    "wandb": lambda name, folder, key: {
        "name": name, "dir": str(folder), "id": key or uuid.uuid4().hex, "resume": "allow",
    },
    "mlflow": lambda name, folder, key: {"run_id": key} if key else {"run_name": name},
    "trackio": lambda name, folder, key: {"name": name, "resume": "allow"},
}  # fmt: skip
"""Arguments with which a tracker continues a run, from its name, folder and earlier identity."""

_IDENTITY: Mapping[str, Callable[[Any], str | None]] = {
    "wandb": lambda tracker: tracker.tracker.id,
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
}


def check_trackers(names: Sequence[Any] | None) -> None:
    """Check that all trackers are known and installed.

    Raises:
        ImportError: if accelerate is not installed.
        TrainingError: naming all trackers that are unknown or not installed.
    """
    wanted = [name for name in names or () if name != _OWN]
    if not wanted:
        return
    tracking = require("accelerate.tracking", "track")
    known = {str(name): made for name, made in tracking.LOGGER_TYPE_TO_CLASS.items()}
    available = {str(name) for name in tracking.get_available_trackers()}
    problems = []
    for name in wanted:
        if isinstance(name, tracking.GeneralTracker) or str(name) in available:
            continue
        if str(name) in known:
            problems.append(f"{name!r} is not installed: pip install {name}")
        else:
            close = closest(str(name), [*known]) or sorted(known)
            problems.append(f"there is no {name!r}, closest: {close}")
    if problems:
        raise TrainingError("track: " + "; ".join(problems))


def trackers(names: Sequence[Any] | None, folder: Path | None) -> Iterator[Callback]:
    """Yield a callback for each tracker.

    Args:
        names: names, or `GeneralTracker` objects of accelerate.
        folder: folder of the run.
    """
    for name in dict.fromkeys(names or ()):
        if name != _OWN:
            yield Tracker(name, folder)


class Tracker(Callback):
    """Gives the settings, losses, metrics and learning rates of a run to a tracker of accelerate.

    Args:
        tracker: name of a tracker, or a `GeneralTracker`.
        folder: folder of the run, in which the tracker's identity is kept for a resumed run.
    """

    def __init__(self, tracker: Any, folder: Path | None) -> None:
        self.given, self.folder = tracker, folder
        self.tracker: Any = None

    def on_train_begin(self, run: TrainingRun) -> None:
        """Start the tracker, or continue the run of the checkpoint."""
        if isinstance(self.given, str):
            self.tracker = self._made(None if run.step == 0 else self._known())
        else:
            self.tracker = self.given
        if hasattr(self.tracker, "start"):  # older ones of accelerate start as they are made
            self.tracker.start()
        self._remember()
        if run.step == 0:
            self.tracker.store_init_configuration(_facts(run))

    def on_step_end(self, run: TrainingRun, row: Row) -> None:
        """Give it every tenth step."""
        if run.step % EVERY == 0:
            self._log("step", row, run.step)

    def on_epoch_end(self, run: TrainingRun, row: Row) -> None:
        """Give it the epoch."""
        self._log("epoch", row, run.step)

    def on_train_end(self, run: TrainingRun) -> None:
        """Give it the metrics of the weights that were kept."""
        self._log("after", run.result.after, run.step)

    def close(self) -> None:
        """End the tracker's run."""
        if self.tracker is not None:
            self.tracker.finish()
            self.tracker = None

    def _log(self, group: str, row: Mapping[str, float], step: int) -> None:
        values = {f"{group}/{k}": v for k, v in row.items() if k not in ("step", "epoch")}
        if values:
            self.tracker.log(values, step=step)

    def _made(self, key: str | None) -> Any:
        tracking = require("accelerate.tracking", "track")
        # from accelerate.state, without which its trackers cannot be started
        require("accelerate.state", "track").PartialState()
        known = {str(name): made for name, made in tracking.LOGGER_TYPE_TO_CLASS.items()}
        made, folder = known[self.given], self.folder or Path.cwd()
        options = _OPTIONS.get(self.given, lambda *_: {})(folder.resolve().name, folder, key)
        if made.requires_logging_directory:
            options["logging_dir"] = str(folder)
        return made("gift", **options)

    def _known(self) -> str | None:
        if self.folder is None or not (self.folder / FILE).is_file():
            return None
        found: str | None = json.loads((self.folder / FILE).read_text()).get(self.given)
        return found

    def _remember(self) -> None:
        identity = _IDENTITY.get(self.given) if isinstance(self.given, str) else None
        if identity is None or self.folder is None:
            return
        path = self.folder / FILE
        known = json.loads(path.read_text()) if path.is_file() else {}
        write_text(path, json.dumps(known | {self.given: identity(self.tracker)}) + "\n")


def _facts(run: TrainingRun) -> dict[str, Any]:
    """Return the settings, network and strategy as texts and numbers."""
    own = {f.name: getattr(run.settings, f.name) for f in dataclasses.fields(run.settings)}
    own |= {name: getattr(run.result, name) for name in ("network", "strategy", "schedule", "task")}
    plain = (str, int, float, bool)
    return {k: v if isinstance(v, plain) else str(v) for k, v in own.items() if v is not None}
