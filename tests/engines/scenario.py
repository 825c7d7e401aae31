"""What the tests of both engines share: jobs that take a while, and the same jobs run alone."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gift
from gift.jobs import JobError, read_job, run_job
from gift.many import search, submitting
from gift.many.engines.base import State, task_command
from gift.many.history import progress_of
from gift.many.task import write_task
from tests.engines.up import CPUS, kill, processes
from tests.many_examples import Net, tiny_job, tiny_search

NETWORK = "import:tests.many_examples:Slow"
FAST = "import:tests.many_examples:Net"


def write_jobs(folder: Path, names: list[str], epochs: int = 30, **resources: Any) -> list[Path]:
    """Write the same job several times, each with a folder of its own."""
    job = tiny_job(folder, epochs=epochs, checkpoint_steps=1)
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


def states(engine: Any, ids: list[str]) -> list[State]:
    return [engine.state(one) for one in ids]


def assert_queued_beyond_the_cores(engine: Any, folder: Path) -> list[str]:
    """Ten jobs of one processor end, and meanwhile some wait: never do more run than fit.

    All have the weights of the job alone. Returns what the engine calls them.
    """
    write_jobs(folder, [f"job{n}" for n in range(10)], epochs=2)
    made = submitting.submit([folder], engine)
    ids = [one.id for one in made]
    assert len(ids) == 10
    waited, most = False, 0

    def over() -> bool:
        nonlocal waited, most
        now = states(engine, ids)
        waited |= State.QUEUED in now
        most = max(most, now.count(State.RUNNING))
        return all(state.is_over for state in now)

    until(over, "all end")
    assert states(engine, ids) == [State.DONE] * 10
    assert waited
    assert 1 <= most <= CPUS
    expected = alone(folder / "job0.yaml")
    for one in made:
        assert_same(weights(Path(one.folder)), expected)
    return ids


def assert_two_processes_end_like_one(engine: Any, place: Path) -> None:
    """One of them is killed meanwhile; the weights are those of torchrun without an engine."""
    [file] = write_jobs(place, ["two"], cpus=2, processes=2)
    [one] = submitting.submit([file], engine)
    folder = Path(one.folder)
    until(lambda: has_begun(folder), "it begins")
    own = [n for n in processes("gift task", str(folder)) if n not in processes("torch.distrib")]
    assert len(own) == 2
    before = progress_of(folder)
    kill([max(own)])
    until(lambda: progress_of(folder) != before, "it goes on")
    until(lambda: engine.state(one.id).is_over, "it ends")
    assert engine.state(one.id) is State.DONE, engine.reason(one.id)

    job = read_job(file, ["folder=alone"])
    subprocess.run(task_command(write_task(job), 2, FAST), check=True)
    assert_same(weights(folder), weights(Path(job.folder)))


def assert_search_goes_on_after_kill(name: str, engine: Any, folder: Path) -> None:
    """A search of 20 trials, whose process is killed while trials run."""
    file = tiny_search(folder, budget={"trials": 20}, parallel=2)
    command = [sys.executable, "-m", "gift", "search", str(file), "--on", name, "--network", FAST]
    process = subprocess.Popen(command)
    trials = folder / "search" / "trials"
    until(lambda: len(list(trials.glob("*/result.json"))) >= 2, "two trials end")
    kill([process.pid])
    process.wait()
    running = {one.folder for one in engine.listed() if not one.state.is_over}
    found = search(file, network=FAST, engine=engine)
    assert found.trials == {"complete": 20, "pruned": 0, "failed": 0, "running": 0}
    known = [one for one in engine.listed() if one.folder is not None]
    known = [one for one in known if one.folder.is_relative_to(trials)]
    assert {one.folder.name for one in known} == {f"{n:04d}" for n in range(20)}
    assert len(known) == 20, "a trial was queued twice"
    assert running <= {one.folder for one in known}
    assert all(one.state is State.DONE for one in known)
    job = read_job(found.jobs[0])
    run_job(job, Net())
    assert_same(weights(Path(job.folder)), weights(found.runs[0]))


def assert_refused(
    engine: Any, resources: dict[str, Any], expected: str, folder: Path, asked: Any = None
) -> None:
    """A job is refused in words, and nothing is queued or written; `asked` lists what is queued."""
    files = write_jobs(folder, ["a"], **resources)
    asked = asked or engine
    before = asked.listed()
    with pytest.raises(JobError) as error:
        submitting.submit(files, engine)
    assert "nothing was queued" in str(error.value)
    assert expected in str(error.value)
    asked.forget()
    assert asked.listed() == before
    assert not (folder / "runs").exists()


def assert_submitted_search_ends(engine: Any, folder: Path) -> None:
    """Two parts share four trials; the best job gives the weights of the best trial."""
    file = tiny_search(folder, parallel=2)
    made = submitting.submit([file], engine)
    ids = [one.id for one in made]
    assert len(ids) == 2
    until(lambda: all(state.is_over for state in states(engine, ids)), "both parts end")
    assert states(engine, ids) == [State.DONE] * 2, [engine.reason(one) for one in ids]
    assert submitting.submit([file], engine) == []
    assert len(list((folder / "search" / "trials").glob("*/result.json"))) == 4
    assert len(submitting.fetch(ids[0], folder / "here")) > 20
    job = read_job(folder / "here" / "best.yaml")
    run_job(job, Net())
    found = search(file, network=FAST)
    assert_same(weights(Path(job.folder)), weights(found.runs[0]))
