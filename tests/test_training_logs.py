"""What training writes down: nothing is lost by a kill, nothing is there twice after a resume."""

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gift.training.logs import CsvLog, Log, TensorBoardLog
from gift.training.settings import Settings
from gift.training.starting import shown_and_kept


def step(number: int, run: int = 0, **more: float) -> dict[str, float]:
    return {"step": number, "loss": 1 / number + run, "lr": 0.1, **more}


def epoch(number: int, run: int = 0) -> dict[str, float]:
    return {"epoch": number, "train_loss": 2 / number + run, "valid_loss": 3 / number + run}


def train(log: Log, steps: range, run: int = 0, each: int = 4) -> None:
    """Steps, and an epoch after each fourth one."""
    for number in steps:
        log.step(step(number, run))
        if number % each == 0:
            log.epoch(epoch(number // each, run))


def rows(file: Path) -> list[dict[str, float]]:
    """What a reader of CSV makes of a file."""
    with file.open(newline="") as lines:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_csv_gives_back_each_value_exactly(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "new")
    values = {"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300, "lr_1": -math.inf, 'odd,"name"': 3.0}
    log.step(values)
    log.close()
    assert rows(tmp_path / "new/steps.csv") == [values]


def test_nan_stays_nan(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    log.epoch({"epoch": 1, "train_loss": math.nan})
    assert math.isnan(rows(tmp_path / "history.csv")[0]["train_loss"])


def test_rows_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    for number in (1, 2):
        log.step(step(number))
        assert rows(tmp_path / "steps.csv")[-1] == step(number)


def test_columns_that_come_later_leave_the_rows_before_as_they_were(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    written = [step(1), step(2, lr_1=0.01), step(3), step(4, lr_2=0.2, lr_1=0.3)]
    for row in written:
        log.step(row)
    assert rows(tmp_path / "steps.csv") == written


@pytest.mark.parametrize("known", range(9))
def test_a_resumed_run_is_written_as_if_it_had_never_been_killed(
    tmp_path: Path, known: int
) -> None:
    """It was killed after step 8 and its checkpoint knows fewer, or none."""
    train(CsvLog(tmp_path), range(1, 9))
    again = CsvLog(tmp_path)
    again.rewind(known, known // 4)
    train(again, range(known + 1, 13), run=5)
    again.close()
    runs = {number: 0 if number <= known else 5 for number in range(1, 13)}
    assert rows(tmp_path / "steps.csv") == [step(number, runs[number]) for number in runs]
    history = [epoch(number, runs[4 * number]) for number in (1, 2, 3)]
    assert rows(tmp_path / "history.csv") == history


def test_rewinding_to_nothing_forgets_the_columns_too(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    log.step(step(1, lr_1=0.2))
    log.rewind(0, 0)
    assert not (tmp_path / "steps.csv").exists()
    log.step(step(1))
    assert (tmp_path / "steps.csv").read_text().splitlines()[0] == "step,loss,lr"


@pytest.mark.parametrize("rewound", [True, False])
def test_a_half_line_is_cut_off(tmp_path: Path, rewound: bool) -> None:
    """Else the "12" of a "123" would be taken for step 12."""
    log = CsvLog(tmp_path)
    for number in range(1, 12):
        log.step(step(number))
    log.close()
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("12")
    again = CsvLog(tmp_path)
    if rewound:
        again.rewind(123, 0)
    again.step(step(12))
    assert rows(tmp_path / "steps.csv") == [step(number) for number in range(1, 13)]


@pytest.mark.parametrize("rubbish", [b"\0\0\0\n", b"\xff\xfe,\n", b"hello\n", b"\n", b'"open\n'])
def test_damaged_lines_are_dropped(tmp_path: Path, rubbish: bytes) -> None:
    log = CsvLog(tmp_path)
    log.step(step(1))
    log.close()
    with (tmp_path / "steps.csv").open("ab") as file:
        file.write(rubbish)
    log.rewind(5, 0)
    log.step(step(2))
    assert rows(tmp_path / "steps.csv") == [step(1), step(2)]


def test_a_full_disk_while_rewinding_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CsvLog(tmp_path)
    train(log, range(1, 5))

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        log.rewind(2, 0)
    monkeypatch.undo()
    assert rows(tmp_path / "steps.csv") == [step(number) for number in range(1, 5)]
    assert {file.name for file in tmp_path.iterdir()} == {"steps.csv", "history.csv"}


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    """SIGKILL leaves no time to write what a buffer holds."""
    code = (
        "import os, signal, sys; from pathlib import Path; from gift.training.logs import CsvLog\n"
        "log = CsvLog(Path(sys.argv[1]))\n"
        "for number in range(1, 4): log.step({'step': number, 'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert rows(tmp_path / "steps.csv") == [{"step": n, "loss": 0.5} for n in (1, 2, 3)]


@pytest.mark.parametrize("known", [8, 6, 4, 0])
def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path, known: int) -> None:
    first = TensorBoardLog(tmp_path / "tensorboard")
    first.rewind(0, 0)
    train(first, range(1, 9))
    first.close()
    again = TensorBoardLog(tmp_path / "tensorboard")
    again.rewind(known, known // 4)
    train(again, range(known + 1, 13), run=5)
    again.close()
    runs = {number: 0 if number <= known else 5 for number in range(1, 13)}
    losses = [(number, pytest.approx(step(number, runs[number])["loss"])) for number in runs]
    assert scalars(tmp_path, "steps/loss") == losses
    valid = [(4 * n, pytest.approx(epoch(n, runs[4 * n])["valid_loss"])) for n in (1, 2, 3)]
    assert scalars(tmp_path, "epochs/valid_loss") == valid


def test_tensorboard_has_an_epoch_as_soon_as_it_ended(tmp_path: Path) -> None:
    logs = TensorBoardLog(tmp_path / "tensorboard")
    train(logs, range(1, 5))
    assert [number for number, _ in scalars(tmp_path, "steps/loss")] == [1, 2, 3, 4]
    assert [number for number, _ in scalars(tmp_path, "epochs/train_loss")] == [4]
    logs.close()


@pytest.mark.parametrize(
    ("has_folder", "tensorboard", "track", "expected"),
    [
        (False, True, None, []),
        (True, False, None, ["TextLog", "CsvLog"]),
        (True, True, None, ["TextLog", "CsvLog", "TensorBoardLog"]),
        (True, False, ["tensorboard"], ["TextLog", "CsvLog", "TensorBoardLog"]),
    ],
)
def test_only_what_was_asked_for_is_written(
    tmp_path: Path, has_folder: bool, tensorboard: bool, track: Any, expected: list[str]
) -> None:
    run: Any = SimpleNamespace(
        settings=Settings(progress=False, tensorboard=tensorboard, track=track),
        processes=SimpleNamespace(first=True),
        folder=tmp_path if has_folder else None,
    )
    assert [type(one).__name__ for one in shown_and_kept(run)] == expected


def test_a_log_is_closed_twice(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    train(log, range(1, 5))
    log.close()
    log.close()
    assert {file.name for file in tmp_path.iterdir()} == {"steps.csv", "history.csv"}


def test_without_tensorboard_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "gift-torch\[train\]"'):
        TensorBoardLog(tmp_path / "tensorboard")
