"""Whatever interrupts a save, one finds the old file or the new one."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gift
from gift import enable_fine_tuning
from gift.files import container
from gift.strategies import LoRAAllFineTuningStrategy

ROOT = Path(__file__).parent.parent


def network(version: int) -> nn.Module:
    """Big enough that writing takes time; all its trained numbers are the version."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=64))
    set_version(net, version)
    return net


def set_version(net: nn.Module, version: int) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(version)


def version_of(path: Path) -> int:
    """The version in a file, which is whole."""
    (version,) = {int(v) for t in gift.inspect(path).tensors.values() for v in t.unique()}
    return version


def save_for_ever(path: str) -> None:
    """Save one version after the other, and tell of each that is done."""
    torch.set_num_threads(1)
    net, version = network(0), 0
    while True:
        version += 1
        set_version(net, version)
        gift.save(net, path)
        print(version, flush=True)


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    """SIGKILL at random moments: never less than what was told to be done, nor something else."""
    path, draw, seen = tmp_path / "delta.safetensors", random.Random(0), []
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_files_killed"]
    children = [
        subprocess.Popen([*command, f"{path}{n}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for number, child in enumerate(children):
        own = Path(f"{path}{number}")
        assert child.stdout is not None
        done = int(child.stdout.readline())
        for _ in range(15):  # stopped at random moments: the file is as a crash would leave it
            time.sleep(draw.uniform(0.001, 0.03))
            child.send_signal(signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)  # it is told to stop, and does so a little later
            seen.append(version_of(own))
            child.send_signal(signal.SIGCONT)
        time.sleep(draw.uniform(0.001, 0.03))
        child.kill()
        done = max(int(line) for line in [str(done), *child.stdout.read().split()])
        child.wait()
        assert done <= version_of(own) <= done + 1
        gift.load(network(0), own)
    assert len(set(seen)) > 10, "it was stopped at different versions"


def test_many_kills_leave_a_whole_file(tmp_path: Path) -> None:
    """The same with a fork for each kill, each of which saves over the file of the last one."""
    path, draw, net = tmp_path / "delta.safetensors", random.Random(1), network(1)
    gift.save(net, path)
    versions = [1]
    for number in range(30):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for version in range(1000 * number, 1000 * number + 1000):
                    set_version(net, version)
                    gift.save(net, path)
                    os.write(writer, f"{version}\n".encode())
            finally:
                os._exit(1)
        os.close(writer)
        begun = os.read(reader, 1) if number % 2 else b""  # on a busy machine none would begin
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as source:
            done = [int(line) for line in (begun + source.read()).split()]
        found = version_of(path)
        first = 1000 * number
        possible = {done[-1], done[-1] + 1} if done else {versions[-1], first}
        assert found in possible
        versions.append(found)
    assert len(set(versions)) > 10


def fails(*args: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl+C interrupts also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while writing": lambda patch: patch.setattr(container, "save_file", fails),
    "while flushing": lambda patch: patch.setattr(os, "fsync", fails),
    "while renaming": lambda patch: patch.setattr(os, "replace", fails),
    "by Ctrl+C": lambda patch: patch.setattr(
        os, "fsync", lambda handle: signal.raise_signal(signal.SIGINT)
    ),
}


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_the_old_file_and_no_other(
    fail: Callable[[pytest.MonkeyPatch], None], exists: bool, tmp_path: Path
) -> None:
    path, net = tmp_path / "delta.safetensors", network(1)
    if exists:
        gift.save(net, path)
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
    set_version(net, 2)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            gift.save(net, path)
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == before
    gift.save(net, path)
    assert version_of(path) == 2


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files fails in the same place: in the middle of the write."""
    path, net = tmp_path / "delta.safetensors", network(1)
    gift.save(net, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    set_version(net, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|os error 27"):
            gift.save(net, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


if __name__ == "__main__":
    save_for_ever(sys.argv[1])
