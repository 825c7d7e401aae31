"""What the tests of both engines share: jobs that take a while, and the same jobs run alone."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import gift
from gift.jobs import read_job, run_job
from gift.many.engines.base import State
from gift.many.history import progress_of
from tests.many_examples import Net, tiny_job

NETWORK = "import:tests.many_examples:Slow"
EPOCHS = 30


def write_jobs(folder: Path, names: list[str], **resources: Any) -> list[Path]:
    """Write the same job several times, each with a folder of its own."""
    job = tiny_job(folder, epochs=EPOCHS, checkpoint_steps=1)
    job["strategy"]["init_paras"] = {"rank": 1}
    files = []
    for name in names:
        file = folder / f"{name}.yaml"
        own = {"folder": f"runs/{name}", "resources": resources}
        file.write_text(yaml.safe_dump(job | own), encoding="utf-8")
        files.append(file)
    return files


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return gift.inspect(folder / "last.safetensors").tensors


def alone(file: Path) -> dict[str, torch.Tensor]:
    """The weights of the same job, run in this process."""
    job = read_job(file, ["folder=alone"])
    run_job(job, Net())
    return weights(Path(job.folder))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def until(holds: Callable[[], Any], what: str, seconds: float = 900) -> Any:
    """Wait until something holds, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s: {what}")


def has_begun(folder: Path) -> bool:
    return progress_of(folder) != ""


def processes(*words: str) -> list[int]:
    """The processes whose command line has all these words."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if all(word in command for word in words) and int(place.name) != os.getpid():
            found.append(int(place.name))
    return found


def kill(numbers: list[int]) -> None:
    assert numbers, "there is nothing to kill"
    for number in numbers:
        os.kill(number, signal.SIGKILL)


def states(engine: Any, ids: list[str]) -> list[State]:
    return [engine.state(one) for one in ids]
