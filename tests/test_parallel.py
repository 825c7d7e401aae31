"""Tensor parallelism with two gloo processes on this machine, see `_parallel_worker`."""

from pathlib import Path

import pytest

from tests._parallel_worker import SCENARIOS, play
from tests.two_processes import check_report, play_in_two


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote how each scenario went."""
    return play_in_two(play, tmp_path_factory.mktemp("played"), 60, 400)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, played: Path) -> None:
    check_report(name, played)
