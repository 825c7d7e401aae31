"""The scripts of `examples/` run from end to end, and do what they print."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torchvision import models

import gift
from gift.methods import METHODS
from gift.strategies import STRATEGIES
from gift.support.recipes import REGISTRY
from tests import documentation

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a script in an empty folder, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    warnings.filterwarnings("ignore", "the delta has more parameters")  # networks are small
    warnings.filterwarnings("ignore", "these cannot have the requested size")

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(printed: str, start: str) -> list[float]:
    """The losses in the lines that begin so."""
    lines = [line for line in printed.splitlines() if line.startswith(start)]
    return [float(line.split()[-1]) for line in lines]


def test_every_script_is_run_here_and_listed() -> None:
    tests = Path(__file__), Path(__file__).parent / "test_examples.py"
    text = "".join(file.read_text(encoding="utf-8") for file in tests)
    listed = (documentation.DOCS / "project" / "index.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert file.stem in text
        assert f"`{file.name}`" in listed


def test_own_loop(script, tmp_path: Path) -> None:
    """Its delta gives a fresh network the head and the LoRA."""
    for part in ("train", "val"):
        documentation.pictures(tmp_path / part)
    few = ["--arch", "shufflenet_v2_x0_5", "--weights", "none", "--size", "32", "--epochs", "2"]
    printed = script("own_loop.py", "train", "--valid", "val", *few, "--batch-size", "4")
    assert "epoch 2: loss" in printed
    torch.manual_seed(0)
    fresh = models.get_model("shufflenet_v2_x0_5")
    gift.load(fresh, "delta.safetensors")
    assert fresh.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 2)


def test_image_folder(script, tmp_path: Path) -> None:
    for part in ("train", "val"):
        documentation.pictures(tmp_path / part)
    name = ["--network", "torchvision:shufflenet_v2_x0_5", "--weights", "none", "--size", "32"]
    few = ["--epochs", "1", "--batch-size", "4", "--predict", "val/ants/0.png"]
    printed = script("image_folder.py", "train", "val", *name, *few)
    assert "ants/0.png" in printed
    assert {"best.safetensors", "last.safetensors", "report.html"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }


def test_language_model(script, tmp_path: Path) -> None:
    """The merged model computes what the delta on the base does."""
    from transformers import AutoModelForCausalLM

    documentation.qwen(tmp_path / "model")
    documentation.corpus(tmp_path / "text.txt")
    few = ["--epochs", "1", "--batch-size", "8", "--length", "16"]
    script("language_model.py", "model", "text.txt", *few)
    base = AutoModelForCausalLM.from_pretrained("model")
    gift.load(base, "tuned.safetensors")
    merged = AutoModelForCausalLM.from_pretrained("tuned")
    tokens = torch.tensor([[3, 4, 6]])
    torch.testing.assert_close(merged(tokens).logits, base(tokens).logits)


def test_many_deltas(script) -> None:
    """Switching and mixing change nothing that a delta has learned."""
    printed = script("many_deltas.py", "--tasks", "2", "--steps", "30")
    losses = numbers(printed, "task 0: "), numbers(printed, "task 1: ")
    again = numbers(printed, "task 0 again"), numbers(printed, "task 1 again")
    before = float(printed.split("loss ")[1].split()[0])
    assert losses[0][0] < 0.9 * before
    assert again[0] == pytest.approx(losses[0], abs=0.02)
    [together] = numbers(printed, "all in one batch")
    assert together == pytest.approx((again[0][0] + again[1][0]) / 2, abs=0.05)


def test_own_method(script) -> None:
    try:
        printed = script("own_method.py", "--steps", "40")
    finally:
        METHODS.pop("rows_and_columns", None)
        for name in [name for name in STRATEGIES if name.startswith("RowsAndColumns")]:
            del STRATEGIES[name], REGISTRY[name]
    for line in printed.splitlines():
        first, last = line.split("loss ")[1].split(" -> ")
        assert float(last) < 0.5 * float(first), line
