"""The scripts in examples/ do what they say, with their smallest models."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_preferences_start_at_log_2_beside_the_right_reference() -> None:
    pytest.importorskip("trl")
    losses = example("preferences_with_trl").main(["--small"])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0]


def test_speech_is_recognised_after_training() -> None:
    pytest.importorskip("soundfile")
    module = example("speech_with_trainer")
    assert module.distance("kitten", "sitting") == 3
    before, after = module.main(["--small"])
    assert after < 0.5 < before


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(path.name in listed for path in EXAMPLES.glob("*.py"))
