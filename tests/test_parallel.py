"""Tensor parallelism with two gloo processes on this machine, see `_parallel_worker`."""

from pathlib import Path

import pytest
import torch

from tests._parallel_worker import SCENARIOS, play
from tests.two_processes import check_report, play_in_two


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote how each scenario went."""
    return play_in_two(play, tmp_path_factory.mktemp("played"), 60, 400)


NOT_BY_OLD = {
    "low_precision": "forgets the mask of words that were looked up twice in 16 bits",
    "no_more_is_communicated": "CommDebugMode fails in the backward pass, of the base as well",
    "disabling_what_was_made_parallel_gives_the_parallel_base[before]": "unfreezes embeddings",
}
"""What ``parallelize_module`` of torch 2.6 does that keeps a scenario from being played."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, played: Path) -> None:
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
    for start, reason in NOT_BY_OLD.items() if old else ():
        if name.startswith(start):
            pytest.skip(f"torch 2.6 {reason}")
    check_report(name, played)
