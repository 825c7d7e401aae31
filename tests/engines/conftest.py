"""Engines for all tests here, if they can be started."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.up import local_ray, local_slurm, missing_for_ray, missing_for_slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Any]:
    if reason := _not_here() or missing_for_slurm():
        pytest.skip(reason)
    with local_slurm() as started:
        yield started


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if reason := _not_here() or missing_for_ray():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where Ray's token is
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, "")
            patch.delenv(name)
        # Its workers give way to all others, so that they hardly begin on a busy machine.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        with local_ray() as started:
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
