"""What needs a GPU is tried on the CPU: it runs, and what it compares agrees there."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run_benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")


def test_the_benchmark_writes_its_table_and_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ("bound", "full", "gift", "peft")
    monkeypatch.setenv("OUT", str(tmp_path))
    given = ("--device", "cpu", "--quick", "--rounds", "1", "--contenders", *ways)
    run_benchmark(monkeypatch, *given)
    stored = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert stored["machine"]["device"] == "cpu"
    (found,) = stored["results"].values()
    assert found["failed"] == {}
    for kind in ("ms", "bytes", "time", "memory"):
        assert set(found[kind]) == {*ways}
        assert all(value > 0 for value in found[kind].values())
    assert found["time"]["bound"] == found["memory"]["bound"] == 1
    # Gradients of all weights need the inputs of all layers, which the bound does not keep.
    assert found["memory"]["full"] > 1
    assert "hidden x tokens" in capsys.readouterr().out


def test_without_a_gpu_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        run_benchmark(monkeypatch)


SOME = "lora-linear- or dora-conv2d- or lora-attention- or lora_fa-embedding- or one_process or "
SOME += "stream or graph or device_and_back or (cudnn and lora-lstm) or (matrix_in and lora)"


def test_the_tests_hold_on_the_cpu() -> None:
    given = ("-p", "no:cacheprovider", "tests/gpu", "--gpu-device", "cpu", "-k", SOME)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
