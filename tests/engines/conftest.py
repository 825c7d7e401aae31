"""Engines for all tests here, if they can be started."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.up import local_slurm, missing_for_slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Any]:
    if reason := _not_here() or missing_for_slurm():
        pytest.skip(reason)
    with local_slurm() as started:
        yield started


def _not_here() -> str:
    own = "GIFT_ENGINES" in os.environ
    return "" if own else "they take minutes: the lane `engines` runs them, or GIFT_ENGINES=1"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submissions of the tests are remembered in a folder of theirs."""
    monkeypatch.setenv("GIFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
