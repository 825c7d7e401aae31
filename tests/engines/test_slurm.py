"""Jobs on a real Slurm: queued, cancelled, killed and resumed, with the weights of a job alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gift.jobs import JobError, read_job
from gift.many import submitting
from gift.many.engines.base import State
from gift.many.engines.slurm_cluster import Slurm
from gift.many.history import progress_of
from gift.many.task import finished
from tests.engines.scenario import (
    FAST,
    NETWORK,
    alone,
    assert_queued_beyond_the_cores,
    assert_refused,
    assert_same,
    assert_search_goes_on_after_kill,
    assert_submitted_search_ends,
    assert_two_processes_end_like_one,
    has_begun,
    states,
    until,
    weights,
    write_jobs,
)  # fmt: skip
from tests.engines.up import kill, processes

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")


def test_jobs_are_queued_killed_cancelled_and_end_with_the_same_weights(
    slurm: Any, tmp_path: Path
) -> None:
    """After SIGKILL of a run, of what watches it, and of the scheduler; one waits meanwhile."""
    files = write_jobs(tmp_path, ["killed", "waits"], cpus=2)
    engine = Slurm(network=NETWORK)
    made = submitting.submit(files, engine)
    ids = [one.id for one in made]
    killed, waits = (tmp_path / "runs" / name for name in ("killed", "waits"))
    assert [one.folder for one in made] == [str(killed), str(waits)]
    until(lambda: states(engine, ids) == [State.RUNNING, State.QUEUED], "one runs, one waits")
    assert [one.id for one in submitting.submit(files, Slurm(network=NETWORK))] == ids
    submitting.cancel(ids[1])
    until(lambda: engine.state(ids[1]) is State.CANCELLED, "the engine hears of it", 30)

    until(lambda: has_begun(killed), "the first begins")
    kill(processes("gift task", str(killed)))
    epochs = progress_of(killed)
    until(lambda: progress_of(killed) != epochs, "it goes on")
    kill([n for n in processes("-u -m submitit.core._submit") if n not in processes("srun")])
    slurm.kill("slurmctld")
    with pytest.raises(JobError, match="Slurm does not answer"):
        engine.stop(ids[0])
    rows, silent = submitting.jobs([engine])
    assert silent
    assert {row.state for row in rows} == {State.UNKNOWN}
    slurm.start("slurmctld")
    slurm.wait()

    again = submitting.resume(str(waits))
    assert again.id != ids[1]
    until(lambda: states(engine, [ids[0], again.id]) == [State.DONE] * 2, "both end")
    expected = alone(files[0])
    for folder in (killed, waits):
        assert_same(weights(folder), expected)
    assert submitting.submit(files, engine) == []
    assert len(submitting.fetch(again.id, tmp_path / "here")) > 5
    assert_same(weights(tmp_path / "here"), expected)


def test_a_run_that_reaches_its_time_limit_goes_on(slurm: Any, tmp_path: Path) -> None:
    """It is warned, writes a checkpoint, is queued again, and ends with the same weights."""
    [file] = write_jobs(tmp_path, ["long"], epochs=60, hours=1 / 60)
    engine = Slurm({"signal_delay_s": 5}, NETWORK)
    [one] = submitting.submit([file], engine)
    folder = Path(one.folder)
    until(lambda: has_begun(folder), "it begins")
    until(lambda: engine.state(one.id) is State.QUEUED, "it is queued again")
    assert "stopped by SIGTERM" in submitting.log_of(one.id).read_text()
    assert (folder / "checkpoint.pt").is_file()
    assert not finished(read_job(file))
    until(lambda: engine.state(one.id).is_over, "it ends")
    assert engine.state(one.id) is State.DONE
    assert_same(weights(folder), alone(file))


def test_ten_jobs_at_once_wait_for_the_cores(slurm: Any, tmp_path: Path) -> None:
    """As an array, of which never more run than there are cores; all end with the same weights."""
    ids = assert_queued_beyond_the_cores(Slurm(network=NETWORK), tmp_path)
    assert len({number.partition("_")[0] for number in ids}) == 1


def test_two_processes_train_one_job(slurm: Any, tmp_path: Path) -> None:
    """By torchrun, which starts both again after SIGKILL of one."""
    assert_two_processes_end_like_one(Slurm(network=NETWORK), tmp_path)


def test_a_search_runs_its_trials_as_jobs_and_outlives_its_process(
    slurm: Any, tmp_path: Path
) -> None:
    """Twenty trials, two at a time; those that run at SIGKILL of the search are not run twice."""
    assert_search_goes_on_after_kill("slurm", Slurm(network=FAST), tmp_path)


def test_a_submitted_search_needs_nobody(slurm: Any, tmp_path: Path) -> None:
    assert_submitted_search_ends(Slurm(network=FAST), tmp_path)


def test_a_submission_whose_process_is_killed_is_found_again(slurm: Any, tmp_path: Path) -> None:
    """Whatever it had queued is listed by Slurm; the same call queues no job twice."""
    files = write_jobs(tmp_path, ["a", "b"])
    arguments = [sys.executable, "-m", "gift", "submit", *map(str, files), "--on", "slurm"]
    process = subprocess.Popen([*arguments, "--network", NETWORK], env=dict(os.environ))
    engine = Slurm(network=NETWORK)
    known = {tmp_path / "runs" / "a", tmp_path / "runs" / "b"}
    until(lambda: any(one.folder in known for one in engine.listed()), "it is queued", 300)
    process.kill()
    process.wait()
    ids = {one.id for one in engine.listed() if one.folder in known}
    made = submitting.submit(files, engine)
    assert {one.id for one in made} == ids
    for one in made:
        engine.stop(one.id)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a partition": ({}, {"partition": "long"}, "there is no partition 'long', there are: short"),
    "GPUs": ({"gpus": 4}, {}, "resources: no node has 4 GPUs"),
    "several": ({"cpus": 64, "memory": "900GB"}, {}, "64 processors and 900GB of memory"),
    "a time": ({"hours": 5}, {}, "no node has 5.0 hours"),
}  # fmt: skip


@pytest.mark.parametrize(("resources", "options", "expected"), WRONG.values(), ids=WRONG)
def test_what_the_cluster_lacks_is_said_before_anything_is_queued(
    slurm: Any,
    resources: dict[str, Any],
    options: dict[str, Any],
    expected: str,
    tmp_path: Path,
) -> None:
    assert_refused(Slurm(options, NETWORK), resources, expected, tmp_path)
