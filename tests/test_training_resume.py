"""A run that was killed ends with the same weights as one that was not."""

import random
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gift
from gift.data.examples import Examples
from gift.schedules import UnfreezeMilestones
from gift.strategies import HeadReplacementStrategy, merge_strategies
from gift.strategies.lora import LoRAAllFineTuningStrategy
from gift.training import TrainingError, finetune, loop
from tests.common import all_bits, full_state

QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False}
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
LABELS = DATA[:, :3].argmax(1)
STEPS = 20


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Images that are changed at random whenever they are read, by three sources of numbers."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(6) + random.random() + numpy.random.rand()
        return DATA[place] + 0.1 * noise, LABELS[place]


def net() -> nn.Module:
    """Statistics that move and dropout, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def shuffled() -> DataLoader[Any]:
    order = torch.Generator().manual_seed(5)
    return DataLoader(Noisy(), batch_size=10, shuffle=True, generator=order)


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (lambda: (DATA, LABELS), {}),
    "momentum, one cycle": (
        lambda: (DATA, LABELS),
        {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}, "lr_schedule": "onecycle"},
    ),
    "together": (lambda: (DATA, LABELS), {"accumulate": 2, "batch_size": 5}),
    "random examples": (Noisy, {}),
    "random examples, read by others": (Noisy, {"workers": 1}),
    "own loader": (shuffled, {}),
    "float16": (lambda: (DATA, LABELS), {"precision": "float16"}),
    "schedule": (
        lambda: (DATA, LABELS),
        {"schedule": partial(UnfreezeMilestones, (1, 3), num_layers=1, train_bn=None)},
    ),
    "no seed": (lambda: (DATA, LABELS), {"seed": None}),
}


def run(name: str, network: nn.Module, **more: Any) -> Any:
    make, settings = RUNS[name]
    if settings.get("seed", 0) is None:
        torch.manual_seed(7)
    strategy = merge_strategies(
        [HeadReplacementStrategy(num_classes=3), LoRAAllFineTuningStrategy(rank=2)]
    )
    settings = {**settings, "schedule": settings.get("schedule", lambda: None)()}
    options = {"epochs": 5, "batch_size": 10, "lr": 0.05, "checkpoint_steps": 3} | settings | more
    return finetune(network, make(), (DATA, LABELS), strategy=strategy, **options, **QUIET)


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs; tests/test_training_report.py is about them."""
    monkeypatch.setattr(loop, "write_report", lambda *_: None)


class Killed(BaseException):
    """No error that anybody handles."""


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = net()
    expected = run(name, whole)
    plain_step, kills, steps = loop.train_step, [1, 6, 8, 11, 20], []

    def step(*args: Any) -> Any:
        steps.append(1)
        if kills and len(steps) == kills[0]:
            kills.pop(0)
            steps.clear()
            raise Killed
        return plain_step(*args)

    monkeypatch.setattr(loop, "train_step", step)
    for _ in range(10):
        killed = net()
        try:
            result = run(name, killed, folder=tmp_path)
            break
        except Killed:
            random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    assert all_bits(killed) == all_bits(whole)
    assert result.steps == expected.steps
    for row, other in zip(result.history, expected.history, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert (result.before, result.after) == (expected.before, expected.after)


def test_a_process_that_is_killed_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """SIGKILL, wherever the process happens to be, also while it writes."""
    script = textwrap.dedent(
        """
        import os, sys, threading
        import torch
        torch.set_num_threads(1)
        from tests.test_training_resume import net, run
        seconds = float(sys.argv[2])
        def kill():
            while not os.path.exists(sys.argv[1] + "/checkpoint.pt"):
                threading.Event().wait(0.002)
            threading.Event().wait(seconds)
            os.kill(os.getpid(), 9)
        threading.Thread(target=kill, daemon=True).start()
        network = net()
        run("random examples", network, folder=sys.argv[1], epochs=200)
        """
    )
    whole = net()
    expected = run("random examples", whole, epochs=8, lr_schedule="constant")
    code = script.replace("epochs=200", "epochs=8, lr_schedule='constant'")
    codes = []
    for seconds in ("0", "0.01"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), seconds], check=False, cwd=Path.cwd()
        )
        codes.append(done.returncode)
    assert -9 in codes
    last = net()
    result = run("random examples", last, folder=tmp_path, epochs=8, lr_schedule="constant")
    assert all_bits(last) == all_bits(whole)
    assert result.steps == expected.steps


def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    first, again = net(), net()
    one = run("adamw", first, folder=tmp_path)
    other = run("adamw", again, folder=tmp_path)
    assert all_bits(first) == all_bits(again)
    assert one.history == other.history
    fresh = net()
    restarted = run("adamw", fresh, folder=tmp_path, restart=True)
    assert all_bits(first) == all_bits(fresh)
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == STEPS + 1
    assert len(restarted.steps) == STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, "lr was 0.05 and is 0.1"),
        ({"epochs": 4}, "epochs was 5 and is 4"),
        ({"batch_size": 20, "precision": "bfloat16"}, "batch_size was 10.*precision was 'float32'"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run("adamw", net(), folder=tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    network = net()
    before = full_state(network)
    with pytest.raises(TrainingError, match=message + ".*restart=True"):
        run("adamw", network, folder=tmp_path, **change)
    assert full_state(network) == before
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("b", "a", "c")}, "classes was .'a', 'b', 'c'"),
        ({"loss": nn.L1Loss()}, "loss was '' and is 'L1Loss'"),
    ],
)
def test_a_run_does_not_go_on_with_other_examples(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def start(classes: Any = ("a", "b", "c"), loss: Any = None) -> Any:
        examples = Examples(TensorDataset(DATA, LABELS), classes=classes)
        strategy = LoRAAllFineTuningStrategy(rank=2)
        return finetune(
            net(), examples, strategy=strategy, loss=loss, folder=tmp_path, epochs=1, **QUIET
        )

    start()
    with pytest.raises(TrainingError, match=message + r".*restart=True"):
        start(**change)


def test_a_run_does_not_go_on_with_another_base(tmp_path: Path) -> None:
    run("adamw", net(), folder=tmp_path)
    other = net()
    nn.init.normal_(other[0].weight)
    with pytest.raises(TrainingError, match=r"values of the base was.*restart=True"):
        run("adamw", other, folder=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    run("adamw", net(), folder=tmp_path, epochs=1)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(TrainingError, match=r"checkpoint.pt is not a checkpoint.*restart=True"):
        run("adamw", net(), folder=tmp_path, epochs=1)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    """From the third epoch on; the network is left with finite numbers."""
    steps = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(outputs, targets)
        if not outputs.requires_grad:  # validation
            return value
        steps.append(1)
        if len(steps) < 10:
            return value
        # The derivative of the root at zero is infinite.
        return value * torch.nan if kind == "loss" else value + (outputs * 0).abs().sqrt().sum()

    network = net()
    strategy = LoRAAllFineTuningStrategy(rank=2)
    with pytest.raises(TrainingError, match=rf"{kind} is not finite in step 2 of epoch 3.*good"):
        finetune(
            network, (DATA, LABELS), (DATA, LABELS), strategy=strategy, loss=loss, epochs=5,
            batch_size=10, folder=tmp_path, **QUIET,
        )  # fmt: skip
    assert all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["counters"]["epoch"] == 2
    fresh = net()
    gift.load(fresh, tmp_path / "best.safetensors")
    assert bool(fresh.eval()(DATA).isfinite().all())
