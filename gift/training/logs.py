"""Logs of training: lines on the console and in ``log.txt``, CSV files, TensorBoard events."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gift.support.atomic_files import write_text
from gift.support.csv_text import csv_text
from gift.support.optional import require
from gift.support.progress import write
from gift.training.callbacks import Callback, Row
from gift.training.report.tables import duration, number, words

if TYPE_CHECKING:
    from gift.training.run import TrainingRun

TEXT_LOG = "log.txt"


class Log(Callback):
    """Base class of callbacks that write down rows, each as soon as it is known."""

    def step(self, row: Row) -> None:
        """Log a step of the optimizer: "step" (from 1) and values."""
        raise NotImplementedError

    def epoch(self, row: Row) -> None:
        """Log an epoch: "epoch" (from 1) and values."""
        raise NotImplementedError

    def rewind(self, step: int, epoch: int) -> None:
        """Discard rows after this step and this epoch; 0 and 0 discard everything."""
        raise NotImplementedError

    def on_train_begin(self, run: TrainingRun) -> None:
        """Discard rows that are later than the checkpoint from which the run resumes."""
        self.rewind(run.step, run.epoch)

    def on_step_end(self, run: TrainingRun, row: Row) -> None:
        """Log the step."""
        self.step(row)

    def on_epoch_end(self, run: TrainingRun, row: Row) -> None:
        """Log the epoch."""
        self.epoch(row)


class CsvLog(Log):
    """``steps.csv`` and ``history.csv``, complete after each row even if the process is killed.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.steps = _Table(folder / "steps.csv", "step")
        self.history = _Table(folder / "history.csv", "epoch")

    def step(self, row: Row) -> None:
        """Add a row to ``steps.csv``."""
        self.steps.add(row)

    def epoch(self, row: Row) -> None:
        """Add a row to ``history.csv``."""
        self.history.add(row)

    def rewind(self, step: int, epoch: int) -> None:
        """Discard rows after this step and this epoch."""
        self.steps.cut(step)
        self.history.cut(epoch)

    def close(self) -> None:
        """Close both files."""
        self.steps.close()
        self.history.close()


class _Table:
    """A CSV file that grows by rows, and by columns when a row has a new one.

    Args:
        path: path of the file.
        key: the column that counts the rows.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.columns: list[str] = []
        self._file: io.TextIOWrapper | None = None

    def add(self, row: Row) -> None:
        if self._file is None:
            self.cut(math.inf)  # drops a partial line left by a killed process
        if new := [name for name in row if name not in self.columns]:
            self._write([*self.columns, *new], self._read()[1])
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", newline="", buffering=1)
        try:
            self._file.write(self._text([row]))
        except OSError as error:  # which names no file
            broken, self._file = self._file, None
            with suppress(OSError):  # it would try again
                broken.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def cut(self, last: float) -> None:
        self.close()
        self.columns, rows = self._read()
        self._write(self.columns if last else [], [row for row in rows if self._at(row) <= last])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Read columns and rows, without an incomplete last line."""
        if not self.path.is_file():
            return [], []
        whole = self.path.read_bytes().rpartition(b"\n")[0].decode(errors="replace")
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        rows = [row for row in reader if not math.isnan(self._at(row))]
        return list(reader.fieldnames or []), rows

    def _at(self, row: Mapping[str, Any]) -> float:
        try:
            return float(row[self.key])
        except (KeyError, TypeError, ValueError):
            return math.nan  # not a row that gift wrote

    def _write(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        self.columns = columns
        if not columns:
            self.path.unlink(missing_ok=True)
            return
        write_text(self.path, self._text([dict(zip(columns, columns, strict=True)), *rows]))

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        return csv_text(self.columns, rows, header=False)


class TensorBoardLog(Log):
    """Events for TensorBoard: ``steps/loss``, ``epochs/valid_accuracy`` and so on.

    Both are logged against optimizer steps, so that a resumed run can tell TensorBoard with one
    number what to discard.

    Args:
        folder: folder of the events; nothing else should be in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = require("tensorboard", "train") and require("torch.utils.tensorboard", "train")
        self._writer: Any = None
        self._last = 0

    def step(self, row: Row) -> None:
        """Add the values of a step."""
        self._last = int(row["step"])
        self._add("steps", "step", row)

    def epoch(self, row: Row) -> None:
        """Add the values of an epoch at its last step."""
        self._add("epochs", "epoch", row)
        self._writer.flush()

    def rewind(self, step: int, epoch: int) -> None:
        """Let TensorBoard discard events after this step."""
        self.close()
        self._last = step
        if not step:
            for file in self.folder.glob("events.out.tfevents.*"):
                file.unlink()

    def close(self) -> None:
        """Write pending events and close the writer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, group: str, key: str, row: Row) -> None:
        if self._writer is None:
            # TensorBoard discards events from the first new step on.
            purge = self._last if group == "steps" else self._last + 1
            self._writer = self._made.SummaryWriter(
                str(self.folder), purge_step=purge, flush_secs=10
            )
        for name, value in row.items():
            if name != key:
                self._writer.add_scalar(f"{group}/{name}", value, self._last)


class Console(Callback):
    """Prints a line for each epoch, and messages."""

    def on_epoch_end(self, run: TrainingRun, row: Row) -> None:
        """Print the epoch."""
        write(epoch_line(run, row))

    def on_message(self, run: TrainingRun, text: str) -> None:
        """Print the message."""
        write(text)


class TextLog(Callback):
    """Appends what `Console` prints to ``log.txt``, with the time.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TEXT_LOG

    def on_epoch_end(self, run: TrainingRun, row: Row) -> None:
        """Append the epoch."""
        self.add(epoch_line(run, row))

    def on_message(self, run: TrainingRun, text: str) -> None:
        """Append the message."""
        self.add(text)

    def add(self, text: str) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def epoch_line(run: TrainingRun, row: Mapping[str, Any]) -> str:
    """Return an epoch as one line: loss, metrics, learning rate, time, and the best so far."""
    total = run.settings.epochs
    values = [
        f"{words(name.removeprefix('train_'))} {number(value)}"
        for name, value in row.items()
        if name not in ("epoch", "step", "seconds")
    ]
    if run.result.steps:
        values.append(f"lr {run.result.steps[-1]['lr']:.3g}")
    values.append(duration(row["seconds"]))
    best = run.result.best_epoch
    if best is not None:
        watch = words(run.settings.watch or run.task.watch)
        here = best == row["epoch"]
        values.append("best so far" if here else f"best: epoch {best}, {watch} {number(run.best)}")
    return f"epoch {row['epoch']:>{len(str(total))}}/{total}: " + ", ".join(values)
