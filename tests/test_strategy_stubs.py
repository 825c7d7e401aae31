"""Editors and type checkers know the strategies that are made when gift is imported."""

import subprocess
import sys
from pathlib import Path

from tests.strategy_stubs import PATH, text

ROOT = Path(__file__).parents[1]
USE = """
from gift.strategies import DoRAConvFineTuningStrategy
from gift.strategies.lora import LoRAAllFineTuningStrategy

LoRAAllFineTuningStrategy(rank=4, lora_alpha=8.0, form="side", experts=False)
DoRAConvFineTuningStrategy(2, conv_layout="out_as_h")
LoRAAllFineTuningStrategy(ranks=4)
DoRAConvFineTuningStrategy(experts=True)
"""


def test_the_stub_is_that_of_the_methods() -> None:
    assert PATH.read_text(encoding="utf-8") == text(), "run `make stubs`"


def test_a_type_checker_knows_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "use.py"
    file.write_text(USE, encoding="utf-8")
    # What `make lint` knows of gift and torch is not found out again.
    command = [sys.executable, "-m", "mypy", "--cache-dir", ".mypy_cache", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    errors = [line for line in run.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in errors] == ["7", "8"], run.stdout + run.stderr
    assert '"ranks"' in errors[0]
    assert '"experts"' in errors[1]
