"""Runs that are interrupted, changed and continued."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gift
from gift.data import Examples, PictureReader, class_folders
from gift.strategies.lora import LoRAAllFineTuningStrategy
from gift.training import Callback, TrainingError, finetune, loop
from tests.common import all_bits
from tests.test_training_resume import DATA, LABELS, net

QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False}
IS_LONG = os.environ.get("GIFT_FAULTS") == "long"


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda *_: None)


@pytest.fixture(autouse=True)
def _python_handles_signals() -> Iterator[None]:
    """Shells let what they start in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(network: nn.Module, folder: Path | None = None, **more: Any) -> Any:
    options = {"epochs": 3, "batch_size": 10, "lr": 0.05, "keep": "last", **QUIET} | more
    data = options.pop("data", (DATA, LABELS))
    strategy = LoRAAllFineTuningStrategy(rank=2)
    return finetune(
        network, data, (DATA, LABELS), strategy=strategy, folder=folder, **QUIET | options
    )


class At(Callback):
    """Does something after a step, or at the end of an epoch."""

    def __init__(self, act: Any, step: int = 0, epoch: int = 0) -> None:
        self.act, self.step, self.epoch = act, step, epoch

    def on_step_end(self, run: Any, row: Any) -> None:
        if row["step"] == self.step:
            self.act()

    def on_epoch_end(self, run: Any, row: Any) -> None:
        if row["epoch"] == self.epoch:
            self.act()


@pytest.mark.parametrize("interruptions", [100 if IS_LONG else 6])
def test_interruptions_at_random_moments_change_no_bit(interruptions: int, tmp_path: Path) -> None:
    """SIGINT, SIGTERM and SIGKILL, also while it starts, evaluates, or writes a checkpoint."""
    script = [sys.executable, "-m", "tests._interrupted_worker"]
    done = subprocess.run(
        [*script, str(tmp_path), str(interruptions), "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ended = [int(code) for code in done.stdout.split()]
    assert {*ended[:-1]} <= {130, -2, -15, -9, 143}
    assert len(ended) > interruptions / 3
    expected, found = (torch.load(tmp_path / f"{name}.pt") for name in ("expected", "weights"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["step", "last step of an epoch", "evaluation"])
def test_a_signal_writes_a_checkpoint_first_and_says_where(
    number: int, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has every step that was made; the next call ends with the same weights."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    whole = net()
    expected = run(whole)
    network, act = net(), lambda: os.kill(os.getpid(), number)
    step = {"step": 6, "last step of an epoch": 8, "evaluation": 8}[where]
    callbacks = [] if where == "evaluation" else [At(act, step=step)]
    handle = None
    if where == "evaluation":

        def evaluated(module: nn.Module, *_: Any) -> None:
            path = tmp_path / "steps.csv"
            if not module.training and path.exists() and path.read_text().count("\n") == 1 + step:
                act()

        handle = network.register_forward_pre_hook(evaluated)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        run(network, tmp_path, callbacks=callbacks)
    if handle is not None:
        handle.remove()
    if number == signal.SIGTERM:
        assert caught.value.code == 143  # type: ignore[union-attr]
    message = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}" in message
    assert str(tmp_path / "checkpoint.pt") in message
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["counters"]["step"] == step
    assert {n: signal.getsignal(n) for n in before} == before
    last = net()
    result = run(last, tmp_path)
    assert all_bits(last) == all_bits(whole)
    assert result.steps == expected.steps
    assert [row["valid_loss"] for row in result.history] == [
        row["valid_loss"] for row in expected.history
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_while_another_network_is_changed_for_a_while(
    number: int, tmp_path: Path
) -> None:
    """Signals have replaced handlers within such a block, before the run and during it."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    teacher = nn.Linear(2, 2)
    gift.enable_fine_tuning(teacher, LoRAAllFineTuningStrategy(rank=1))
    act = At(lambda: os.kill(os.getpid(), number), step=6)
    with gift.disabled(teacher):
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            run(net(), tmp_path, callbacks=[act])
        assert torch.load(tmp_path / "checkpoint.pt")["counters"]["step"] == 6
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(net(), tmp_path, callbacks=[At(twice, step=6)])
    assert not caught.value.args
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["counters"]["step"] == 4


def test_own_handlers_of_signals_are_left_alone(tmp_path: Path) -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        act = At(lambda: os.kill(os.getpid(), signal.SIGTERM), step=6)
        assert len(run(net(), tmp_path, callbacks=[act]).steps) == 12
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [signal.SIGTERM]


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    """While the first one trains; afterwards the folder is free, also if it failed."""
    refused: list[str] = []

    def second() -> None:
        try:
            run(net(), tmp_path)
        except TrainingError as error:
            refused.append(str(error))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(net(), tmp_path, callbacks=[At(second, step=6)])
    assert len(refused) == 1
    assert f"another run trains in {tmp_path}" in refused[0]
    assert len(run(net(), tmp_path).steps) == 12


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear", "onecycle"])
def test_more_epochs_continue_a_run_that_has_ended(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates are those of a run that was to be as long from the start; so is all, if constant."""
    settings: dict[str, Any] = {"lr_schedule": shape, "warmup": 0.25, "progress": True}
    if shape == "constant":
        settings["warmup"] = 0.0
    run(net(), tmp_path, epochs=2, **settings)
    capsys.readouterr()
    longer, whole = net(), net()
    result = run(longer, tmp_path, epochs=5, **settings)
    assert capsys.readouterr().out.startswith("resuming at epoch 3; there were to be 2 epochs")
    expected = run(whole, epochs=5, **settings)
    assert [row["lr"] for row in result.steps[8:]] == pytest.approx(
        [row["lr"] for row in expected.steps[8:]]
    )
    assert len(result.steps) == 20
    assert (all_bits(longer) == all_bits(whole)) == (shape == "constant")


def test_more_epochs_wake_a_run_that_had_stopped_early(tmp_path: Path) -> None:
    settings = {"patience": 1, "watch": "loss", "lr": 1e-30, "lr_schedule": "constant"}
    first = run(net(), tmp_path, epochs=4, **settings)
    assert (len(first.history), first.stopped) == (2, "no improvement in 1 epochs")
    again = run(net(), tmp_path, epochs=6, **settings)
    assert len(again.history) == 3


def images(folder: Path, count: int = 6) -> Path:
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for place in range(count):
            shade = 200 * number + place
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(folder / name / f"{place}.png")
    return folder


def on_images(folder: Path, data: Path, network: nn.Module | None = None, **more: Any) -> Any:
    examples = class_folders(data, PictureReader(size=8))
    torch.manual_seed(0)
    network = network or nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    options = {"epochs": 2, "batch_size": 4, **QUIET, "lr_schedule": "constant"} | more
    return finetune(network, examples, examples, folder=folder, **options)


def test_a_damaged_file_that_was_taken_out_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on only if that is said; moving the folder is no change."""
    data, folder = images(tmp_path / "data"), tmp_path / "run"
    (data / "light" / "4.png").write_bytes((data / "light" / "4.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"4\.png"):
        on_images(folder, data)
    good = images(tmp_path / "good")
    on_images(folder, good, epochs=1)
    data = good.rename(tmp_path / "moved")
    (data / "light" / "5.png").unlink()
    Image.new("RGB", (9, 9)).save(data / "dark" / "new.png")
    Image.new("RGB", (30, 30), (3, 1, 2)).save(data / "dark" / "0.png")
    with pytest.raises(TrainingError, match=r"some of the 12 training.*--accept-changed") as told:
        on_images(folder, data, epochs=2)
    for text in ("1 gone (light/5.png)", "1 new (dark/new.png)", "1 changed (dark/0.png)"):
        assert text in str(told.value)
    result = on_images(folder, data, epochs=2, accept_changed_data=True, progress=True)
    assert "going on with other examples: some of the 12" in capsys.readouterr().out
    assert len(result.history) == 2
    assert len(on_images(folder, data, epochs=3).history) == 3


def test_other_tensors_are_a_change(tmp_path: Path) -> None:
    run(net(), tmp_path, epochs=1)
    other = (DATA + 1, LABELS)
    with pytest.raises(TrainingError, match="some of the 40 training examples are other"):
        run(net(), tmp_path, epochs=2, data=other)
    assert len(run(net(), tmp_path, epochs=2, data=other, accept_changed_data=True).history) == 2


def test_a_run_goes_on_with_fewer_examples_than_steps_were_done(tmp_path: Path) -> None:
    act = At(lambda: os.kill(os.getpid(), signal.SIGINT), step=7)
    with pytest.raises(KeyboardInterrupt):
        run(net(), tmp_path, callbacks=[act])
    fewer = (DATA[:20], LABELS[:20])
    result = run(net(), tmp_path, data=fewer, accept_changed_data=True)
    assert [row["step"] for row in result.history] == [4, 7, 9]


def test_the_best_is_judged_again_on_other_validation_examples(tmp_path: Path) -> None:
    """Else a value on easier examples would never be reached."""

    def start(valid: Any, epochs: int) -> Any:
        return finetune(
            net(), (DATA, LABELS), valid, strategy=LoRAAllFineTuningStrategy(rank=2), lr=0.05,
            lr_schedule="constant", batch_size=10, folder=tmp_path, epochs=epochs,
            accept_changed_data=True, **QUIET,
        )  # fmt: skip

    network = net()
    with torch.no_grad():
        easy = network.eval()(DATA).argmax(1)
    start((DATA, easy), 1)
    result = start((DATA, LABELS), 8)
    assert result.best_epoch > 1
    assert result.after["loss"] == pytest.approx(
        min(row["valid_loss"] for row in result.history[1:])
    )


def test_damaged_examples_are_counted_listed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are those of a run without these files."""
    data, same = images(tmp_path / "data"), images(tmp_path / "same")
    for name in ("light/4.png", "dark/1.png"):
        (data / name).write_bytes((data / name).read_bytes()[:40])
        (same / name).unlink()
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(192, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    result = on_images(tmp_path / "run", data, nets[0], skip_damaged=True, progress=True)
    assert "4 examples cannot be read and are left out" in capsys.readouterr().out
    on_images(tmp_path / "other", same, nets[1])
    assert all_bits(nets[0]) == all_bits(nets[1])
    listed = (tmp_path / "run" / "damaged.txt").read_text().splitlines()
    assert listed == result.skipped
    assert len(listed) == 4  # of those to learn from, and of those to validate on
    assert all(name in "".join(listed) for name in ("light/4.png", "dark/1.png"))
    assert len(on_images(tmp_path / "run", same, epochs=3).history) == 3  # now they are gone
    assert not (tmp_path / "run" / "damaged.txt").exists()


def test_nothing_but_damaged_examples_is_an_error(tmp_path: Path) -> None:
    class Broken(TensorDataset):
        def __getitem__(self, place: Any) -> tuple[Tensor, ...]:
            raise OSError("the disk is gone")

    with pytest.raises(TrainingError, match=r"none of the training examples.*disk is gone"):
        run(net(), data=Examples(Broken(DATA, LABELS)), skip_damaged=True)


LIMITED = """
import resource, signal, sys
import torch
from tests.test_interrupted import At, loop, net, run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
loop.write_report = lambda *_: None
def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run(net(), sys.argv[1], callbacks=[At(full, step=6)])
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("limit", "name"), [(4096, "checkpoint.pt|best.safetensors"),
                                            (300, "steps.csv")])  # fmt: skip
def test_a_full_disk_names_the_file_and_the_last_checkpoint_stays(
    limit: int, name: str, tmp_path: Path
) -> None:
    """Files that may not grow stand for the disk."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)], capture_output=True, text=True
    )
    assert done.stdout.startswith("TrainingError "), done.stdout + done.stderr
    assert any(part in done.stdout for part in name.split("|"))
    assert f"{tmp_path / 'checkpoint.pt'} is still the last good checkpoint" in done.stdout
    last, whole = net(), net()
    run(whole)
    run(last, tmp_path)
    assert all_bits(last) == all_bits(whole)
