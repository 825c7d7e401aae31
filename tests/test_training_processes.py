"""Two gloo processes train as one alone does, with DDP and FSDP2; see `_training_worker`."""

from pathlib import Path

import pytest

from tests._training_worker import SCENARIOS, play
from tests.two_processes import check_report, play_in_two


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote how each scenario went."""
    return play_in_two(play, tmp_path_factory.mktemp("trained"), 30, 300)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, played: Path) -> None:
    check_report(name, played)
