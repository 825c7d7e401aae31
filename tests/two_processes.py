"""Scenarios that two gloo processes on this machine play together."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

SKIPPED = "skipped: "
"""How the report of a scenario begins that cannot be played here."""


def play_in_two(
    play: Callable[..., Any], folder: Path, collective_seconds: int, all_seconds: int
) -> Path:
    """The folder, in which `play` wrote how each scenario went, as ``NAME.RANK``.

    A collective that waits for longer fails, and all processes together are given up in the end.
    """
    processes = torch.multiprocessing.spawn(
        play, (folder, collective_seconds), nprocs=2, join=False, daemon=True
    )
    deadline = time.monotonic() + all_seconds
    with contextlib.suppress(ProcessExitedException, ProcessRaisedException):  # reports are missing
        while not processes.join(timeout=1) and time.monotonic() < deadline:
            pass
    for process in processes.processes:
        process.kill()
    return folder


def check_report(name: str, folder: Path) -> None:
    """Fail with what both processes say of a scenario, if that is anything."""
    reports = [folder / f"{name}.{rank}" for rank in (0, 1)]
    assert all(report.exists() for report in reports), "a process died or hung before"
    texts = [report.read_text() for report in reports]
    if texts[0] == texts[1] and texts[0].startswith(SKIPPED):
        pytest.skip(texts[0].removeprefix(SKIPPED))
    errors = [f"process {i}: {text}" for i, text in enumerate(texts)]
    if errors != ["process 0: ", "process 1: "]:
        pytest.fail("\n".join(errors), pytrace=False)
