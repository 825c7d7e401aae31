"""The command line, run as users run it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gift
from gift.strategies import LoRAAllFineTuningStrategy


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gift", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    net(torch.randn(4, 64))  # moves the statistics
    gift.save(net, tmp_path / "task.safetensors")
    return tmp_path / "task.safetensors"


def test_show_tells_what_is_in_a_file(delta: Path) -> None:
    shown = run("show", delta)
    assert shown.returncode == 0, shown.stderr
    for expected in (
        "Sequential", "LoRAAllFineTuningStrategy(rank=2", "0.weight", "32x64", "rank=2",
        "2.lora_A", "1.running_mean", "6 tensors, by name", gift.__version__,
    ):  # fmt: skip
        assert expected in shown.stdout, expected


def test_show_lists_everything_on_demand(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(30)))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    gift.save(net, tmp_path / "deep.safetensors")
    names = [f"{i}.lora_A" for i in range(30)]
    brief, whole = (
        run("show", tmp_path / "deep.safetensors"),
        run("show", tmp_path / "deep.safetensors", "--all"),
    )
    assert not all(name in brief.stdout for name in names)
    assert "more" in brief.stdout
    assert all(name in whole.stdout for name in names)


def test_a_damaged_file_is_an_error_in_words(delta: Path) -> None:
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    shown = run("show", delta)
    assert shown.returncode == 1
    assert "damaged" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_missing_file_is_an_error_in_words(tmp_path: Path) -> None:
    shown = run("show", tmp_path / "none.safetensors")
    assert shown.returncode == 1
    assert "none.safetensors" in shown.stderr
    assert "Traceback" not in shown.stderr
