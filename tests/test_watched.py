"""A run can be watched: a line for each epoch, bars in terminals alone, callbacks, trackers."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gift.data import Examples
from gift.support import progress
from gift.training import Callback, TrainingError, finetune, loop

QUIET: dict[str, Any] = {"device": "cpu", "tensorboard": False}
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
LABELS = DATA[:, :3].argmax(1)


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda *_: None)


def run(net: nn.Module | None = None, **more: Any) -> Any:
    if net is None:
        torch.manual_seed(0)
        net = nn.Linear(6, 3)
    options = {"epochs": 3, "batch_size": 10, "lr": 0.05} | more
    return finetune(net, (DATA, LABELS), (DATA, LABELS), **options, **QUIET)


class Notes(Callback):
    """What was called, and the state of the run at that moment."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_train_begin(self, run: Any) -> None:
        self.calls.append(("begin", run.epoch, run.step))

    def on_epoch_begin(self, run: Any) -> None:
        self.calls.append(("epoch begins", run.epoch, run.step))

    def on_step_end(self, run: Any, row: Any) -> None:
        self.calls.append(("step", row["step"], run.step))

    def on_epoch_end(self, run: Any, row: Any) -> None:
        self.calls.append(("epoch", row["epoch"], run.step))

    def on_checkpoint(self, run: Any, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.calls.append(("checkpoint", state["counters"]["epoch"], state["counters"]["step"]))

    def on_train_end(self, run: Any) -> None:
        self.calls.append(("end", run.result.after["loss"] > 0, run.step))

    def close(self) -> None:
        self.calls.append("closed")


class Interrupted(Exception):
    pass


class StopsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, row: Any) -> None:
        if row["step"] == self.step:
            raise Interrupted


def test_an_epoch_is_a_line_on_the_screen_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(folder=tmp_path)
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert len(lines) == 3
    for line, row in zip(lines, result.history, strict=True):
        assert line.startswith(f"epoch {row['epoch']}/3: ")
        found = {k: float(v) for k, v in re.findall(r"([a-z ]*[a-z0-9]+) ([-+.e0-9]+)", line)}
        found = {name.strip(): value for name, value in found.items()}
        assert found["loss"] == pytest.approx(row["train_loss"], rel=1e-3)
        assert found["valid loss"] == pytest.approx(row["valid_loss"], rel=1e-3)
        assert found["valid accuracy"] == pytest.approx(row["valid_accuracy"], rel=1e-3)
        assert found["lr"] == pytest.approx(result.steps[int(row["step"]) - 1]["lr"], rel=1e-2)
        assert re.search(r", [-.e0-9]+ s, ", line)
        lowest = min(result.history[: int(row["epoch"])], key=lambda one: one["valid_loss"])
        text = "best so far" if lowest is row else f"best: epoch {lowest['epoch']}, loss"
        assert text in line
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is redrawn in place; a file gets none, nor does whoever hides them."""
    for screen, settings in ((Terminal(), {}), (io.StringIO(), {}), (Terminal(), {"progress": 0})):
        monkeypatch.setattr("sys.stderr", screen)
        run(**{name: bool(value) for name, value in settings.items()})
        drawn = isinstance(screen, Terminal) and not settings
        assert ("\repoch 1/3:" in screen.getvalue()) == drawn
        assert bool(screen.getvalue()) == drawn


@pytest.mark.parametrize("hide", [True, False])
def test_long_work_shows_a_bar_after_two_seconds(
    hide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hides bars sees none; short work shows none."""
    now = [0.0]

    def work(seconds: float) -> str:
        screen = Terminal()
        monkeypatch.setattr("sys.stderr", screen)
        with progress.hidden(hide):
            for _ in progress.slow(range(20), "digesting"):
                now[0] += seconds / 20
        return screen.getvalue()

    import tqdm.std

    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    assert "digesting" not in work(1.0)
    assert ("digesting" in work(10.0)) is not hide


def test_a_resumed_run_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        run(folder=tmp_path, checkpoint_steps=3, callbacks=[StopsAt(8)])
    capsys.readouterr()
    run(folder=tmp_path, checkpoint_steps=3)
    assert capsys.readouterr().out.splitlines()[0] == "resuming at epoch 2, step 3 of 4"
    run(folder=tmp_path, checkpoint_steps=3)
    assert capsys.readouterr().out.startswith("finished already, after epoch 3")
    assert "resuming at epoch 2, step 3 of 4" in (tmp_path / "log.txt").read_text()


def test_callbacks_are_called_with_the_run(tmp_path: Path) -> None:
    notes = Notes()
    run(folder=tmp_path, epochs=2, callbacks=[notes], progress=False)
    expected: list[Any] = [("begin", 0, 0)]
    for epoch in (1, 2):
        first = 4 * (epoch - 1)
        expected.append(("epoch begins", epoch - 1, first))
        expected += [("step", first + n, first + n) for n in (1, 2, 3, 4)]
        expected += [("epoch", epoch, 4 * epoch), ("checkpoint", epoch, 4 * epoch)]
    assert notes.calls == [*expected, ("end", True, 8), "closed"]


def test_callbacks_change_nothing_and_are_closed_after_an_error() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(6, 3), nn.Linear(6, 3)
    two.load_state_dict(one.state_dict())
    notes = Notes()
    run(one, progress=False)
    run(two, progress=False, callbacks=[notes])
    assert torch.equal(one.weight, two.weight)
    assert notes.calls[-1] == "closed"
    again = Notes()
    with pytest.raises(Interrupted):
        run(progress=False, callbacks=[StopsAt(2), again])
    assert again.calls[-2:] == [("step", 1, 1), "closed"]


def test_a_callback_ends_the_training() -> None:
    class Enough(Callback):
        def on_epoch_end(self, run: Any, row: Any) -> None:
            if row["epoch"] == 2:
                run.stop("it is enough")

    result = run(callbacks=[Enough()], progress=False, epochs=5)
    assert (len(result.history), result.stopped) == (2, "it is enough")


def test_what_is_no_callback_is_refused() -> None:
    net = nn.Linear(6, 3)
    before = net.weight.clone()
    with pytest.raises(TypeError, match=r"derive from gift\.training\.Callback"):
        run(net, callbacks=[print])
    assert torch.equal(net.weight, before)


class Recorder(GeneralTracker):
    """A tracker of accelerate that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = 0

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_a_tracker_gets_settings_losses_metrics_and_rates() -> None:
    recorder = Recorder()
    result = run(track=[recorder], progress=False, epochs=5)
    assert recorder.config["lr"] == 0.05
    assert recorder.config["network"] == "Linear"
    epochs = [(step, row) for step, row in recorder.rows if "epoch/train_loss" in row]
    assert [(step, row["epoch/valid_accuracy"]) for step, row in epochs] == [
        (row["step"], row["valid_accuracy"]) for row in result.history
    ]
    steps = [(step, row["step/loss"]) for step, row in recorder.rows if "step/loss" in row]
    assert steps == [(row["step"], row["loss"]) for row in result.steps[9::10]]
    assert recorder.rows[-1] == (20, {f"after/{k}": v for k, v in result.after.items()})
    assert recorder.finished == 1


def test_unknown_trackers_are_named_before_anything_starts(tmp_path: Path) -> None:
    net = nn.Linear(6, 3)
    before = net.weight.clone()
    with pytest.raises(TrainingError, match=r"'wandbb', closest: \['wandb'.*'dvclive' is not"):
        run(net, track=["wandbb", "dvclive"], folder=tmp_path / "run")
    with pytest.raises(ValueError, match="track is 'wandb', expected names in a list"):
        run(net, track="wandb")
    assert torch.equal(net.weight, before)
    assert not (tmp_path / "run").exists()


def test_examples_are_a_torch_data_set() -> None:
    examples = Examples(torch.utils.data.TensorDataset(DATA, LABELS), classes=("a", "b", "c"))
    assert isinstance(examples, Dataset)
    assert torch.equal(examples[0][0], DATA[0])
    assert torch.equal(examples.part([3, 5])[1][0], DATA[5])
    batches: Iterator[Any] = iter(DataLoader(examples, batch_size=16))
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), DATA)
