"""What is written down while a network is trained: CSV files, and events for TensorBoard."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gift.support.atomic_files import write_text
from gift.support.optional import require

Row = Mapping[str, float]


class Log(Protocol):
    """What a training loop calls."""

    def step(self, row: Row) -> None:
        """After a step of the optimizer: "step" (from 1), and values."""

    def epoch(self, row: Row) -> None:
        """After an epoch: "epoch" (from 1), and values."""

    def rewind(self, step: int, epoch: int) -> None:
        """Forget what came after that step and that epoch: training goes on from there."""

    def close(self) -> None:
        """Nothing more comes."""


class Logs:
    """Several logs as one.

    Args:
        logs: each is told everything.
    """

    def __init__(self, logs: Sequence[Log]) -> None:
        self.logs = tuple(logs)

    def step(self, row: Row) -> None:
        """After a step of the optimizer: "step" (from 1), and values."""
        for log in self.logs:
            log.step(row)

    def epoch(self, row: Row) -> None:
        """After an epoch: "epoch" (from 1), and values."""
        for log in self.logs:
            log.epoch(row)

    def rewind(self, step: int, epoch: int) -> None:
        """Forget what came after that step and that epoch; 0 and 0 forget everything."""
        for log in self.logs:
            log.rewind(step, epoch)

    def close(self) -> None:
        """Nothing more comes."""
        for log in self.logs:
            log.close()


def open_logs(folder: Path | None, tensorboard: bool = True) -> Logs:
    """The logs of a run. Call `Logs.rewind` before the first row, where files may be there.

    Args:
        folder: gets ``history.csv``, ``steps.csv`` and ``tensorboard/``; None writes nothing.
        tensorboard: whether that last one is written.
    """
    if folder is None:
        return Logs(())
    more = [TensorBoardLog(folder / "tensorboard")] if tensorboard else []
    return Logs([CsvLog(folder), *more])


class CsvLog:
    """``steps.csv`` and ``history.csv``, whole after each row, whenever the process is killed.

    Args:
        folder: where they are.
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
        """Cut off what came after that step and that epoch."""
        self.steps.cut(step)
        self.history.cut(epoch)

    def close(self) -> None:
        """Close both files."""
        self.steps.close()
        self.history.close()


class _Table:
    """A CSV file that grows by rows, and by columns where a row has a new one.

    Args:
        path: of the file.
        key: the column that counts.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.columns: list[str] = []
        self._file: io.TextIOWrapper | None = None

    def add(self, row: Row) -> None:
        if self._file is None:
            self.cut(math.inf)  # a half line, left by a kill
        if new := [name for name in row if name not in self.columns]:
            self._write([*self.columns, *new], self._read()[1])
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", newline="", buffering=1)
        self._file.write(self._text([row]))

    def cut(self, last: float) -> None:
        self.close()
        self.columns, rows = self._read()
        self._write(self.columns if last else [], [row for row in rows if self._at(row) <= last])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns and rows; a last line that is not whole is left out."""
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
            return math.nan  # no row of ours

    def _write(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        self.columns = columns
        if not columns:
            self.path.unlink(missing_ok=True)
            return
        write_text(self.path, self._text([dict(zip(columns, columns, strict=True)), *rows]))

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, self.columns, lineterminator="\n", extrasaction="ignore")
        writer.writerows(rows)
        return out.getvalue()


class TensorBoardLog:
    """Events for TensorBoard: ``steps/loss``, ``epochs/valid_accuracy`` and so on.

    Both stand over the steps of the optimizer, so that a run that goes on can tell TensorBoard by
    one number what to forget.

    Args:
        folder: where they are; nothing else should be there.
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
        """Add the values of an epoch at the step with which it ended."""
        self._add("epochs", "epoch", row)
        self._writer.flush()

    def rewind(self, step: int, epoch: int) -> None:
        """Let TensorBoard forget what came after that step."""
        self.close()
        self._last = step
        if not step:
            for file in self.folder.glob("events.out.tfevents.*"):
                file.unlink()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, group: str, key: str, row: Row) -> None:
        if self._writer is None:
            # The first row that is written, and all above it, are new.
            purge = self._last if group == "steps" else self._last + 1
            self._writer = self._made.SummaryWriter(
                str(self.folder), purge_step=purge, flush_secs=10
            )
        for name, value in row.items():
            if name != key:
                self._writer.add_scalar(f"{group}/{name}", value, self._last)
