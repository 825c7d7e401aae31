"""Scenarios that two gloo processes on this machine play together."""

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

SKIPPED = "skipped: "
"""How the report of a scenario begins that cannot be played here."""


class Scenarios(dict[str, Callable[[Path], None]]):
    """What two processes play, by name; each takes a folder of its own."""

    def for_each(self, *cases: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Decorator: two processes play it, with each of these as its first argument."""

        def register(function: Callable[..., None]) -> Callable[..., None]:
            for case in cases:
                self[f"{function.__name__}[{case}]"] = partial(function, case)
            return function

        return register


def play_all(
    scenarios: Mapping[str, Callable[[Path], None]], rank: int, folder: Path, seconds: float
) -> None:
    """Play scenarios in this process; what one raises stands in the file ``<name>.<rank>``."""
    torch.set_num_threads(1)
    for name, function in scenarios.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        message = ""
        try:
            meeting = dist.FileStore(str(place / "meeting"), 2)
            wait = timedelta(seconds=seconds)
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2, timeout=wait)
            function(place)
            dist.barrier()
        except pytest.skip.Exception as skipped:
            message = f"{SKIPPED}{skipped}"
        except BaseException:  # what pytest.raises raises is not an Exception
            message = traceback.format_exc()
        finally:
            if dist.is_initialized():
                # torch 2.6 waits for gloo's threads and holds the GIL, which they may wait for.
                time.sleep(0.02)
                dist.destroy_process_group()
        (folder / f"{name}.{rank}").write_text(message, encoding="utf-8")


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
