"""Two gloo processes train as one alone does, with DDP and FSDP2; see `_training_worker`."""

import contextlib
import time
from pathlib import Path

import pytest
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests._training_worker import SCENARIOS, play

COLLECTIVE_SECONDS, ALL_SECONDS = 30, 300


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote how each scenario went."""
    folder = tmp_path_factory.mktemp("trained")
    processes = torch.multiprocessing.spawn(
        play, (folder, COLLECTIVE_SECONDS), nprocs=2, join=False, daemon=True
    )
    deadline = time.monotonic() + ALL_SECONDS
    with contextlib.suppress(ProcessExitedException, ProcessRaisedException):  # reports are missing
        while not processes.join(timeout=1) and time.monotonic() < deadline:
            pass
    for process in processes.processes:
        process.kill()
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, played: Path) -> None:
    reports = [played / f"{name}.{rank}" for rank in (0, 1)]
    assert all(report.exists() for report in reports), "a process died or hung before"
    errors = [f"process {i}: {report.read_text()}" for i, report in enumerate(reports)]
    if errors != ["process 0: ", "process 1: "]:
        pytest.fail("\n".join(errors), pytrace=False)
