"""Jobs on a real Ray: queued, cancelled, killed and resumed, with the weights of a job alone."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gift.jobs import read_job
from gift.many import submitting
from gift.many.engines.base import State
from gift.many.engines.ray_cluster import LOCAL, Ray
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


def test_a_killed_run_and_a_killed_worker_are_started_again(ray: Any, tmp_path: Path) -> None:
    """One waits meanwhile, is cancelled, and resumed; the weights are those of a job alone."""
    files = write_jobs(tmp_path, ["killed", "waits"], cpus=2)
    engine = Ray(network=NETWORK)
    [first] = submitting.submit(files[:1], engine)
    until(lambda: engine.state(first.id) is State.RUNNING, "the first runs")
    ids = [one.id for one in submitting.submit(files, engine)]
    assert ids[0] == first.id
    killed, waits = (tmp_path / "runs" / name for name in ("killed", "waits"))
    until(lambda: states(engine, ids) == [State.RUNNING, State.QUEUED], "one runs, one waits")
    assert [one.id for one in submitting.submit(files, Ray(network=NETWORK))] == ids
    submitting.cancel(ids[1])
    assert engine.state(ids[1]) is State.CANCELLED
    assert not (waits / "output.log").exists()

    until(lambda: has_begun(killed), "the first begins")
    kill(processes("gift task", str(killed)))
    epochs = progress_of(killed)
    until(lambda: progress_of(killed) != epochs, "it goes on")
    kill(processes("ray::gift_run"))
    until(lambda: processes("ray::gift_run"), "Ray starts another worker")
    again = submitting.resume(str(waits))
    rows, silent = submitting.jobs()
    assert silent == []
    assert {row.id for row in rows} >= {*ids, again.id}
    until(lambda: states(engine, [ids[0], again.id]) == [State.DONE] * 2, "both end")
    expected = alone(files[0])
    for folder in (killed, waits):
        assert_same(weights(folder), expected)
    assert submitting.submit(files, engine) == []
    assert len(submitting.fetch(again.id, tmp_path / "here")) > 5
    assert_same(weights(tmp_path / "here"), expected)


def test_a_cancelled_run_writes_a_checkpoint_and_goes_on(ray: Any, tmp_path: Path) -> None:
    [file] = write_jobs(tmp_path, ["long"])
    [one] = submitting.submit([file], Ray(network=NETWORK))
    until(lambda: has_begun(Path(one.folder)), "it begins")
    submitting.cancel(one.id)
    engine = Ray(network=NETWORK)
    assert engine.state(one.id) is State.CANCELLED
    assert processes("gift task", one.folder) == []
    assert "stopped by SIGTERM" in submitting.log_of(one.id).read_text()
    assert finished(read_job(file)) is None
    again = submitting.resume(one.id)
    until(lambda: engine.state(again.id).is_over, "it ends")
    assert engine.state(again.id) is State.DONE
    assert_same(weights(Path(one.folder)), alone(file))


def test_ten_jobs_at_once_wait_for_the_cores(ray: Any, tmp_path: Path) -> None:
    assert_queued_beyond_the_cores(Ray(network=NETWORK), tmp_path)


def test_two_processes_train_one_job(ray: Any, tmp_path: Path) -> None:
    """By torchrun, which starts both again after SIGKILL of one."""
    assert_two_processes_end_like_one(Ray(network=NETWORK), tmp_path)


def test_a_search_runs_its_trials_as_jobs_and_outlives_its_process(
    ray: Any, tmp_path: Path
) -> None:
    """Twenty trials, two at a time; those that run at SIGKILL of the search are not run twice."""
    assert_search_goes_on_after_kill("ray", Ray(network=FAST), tmp_path)


def test_a_submitted_search_needs_nobody(ray: Any, tmp_path: Path) -> None:
    assert_submitted_search_ends(Ray(network=FAST), tmp_path)


def test_a_run_that_fails_is_not_repeated(ray: Any, tmp_path: Path) -> None:
    """Its reason is that of the run, and `gift logs` prints it."""
    [file] = write_jobs(tmp_path, ["fails"])
    engine = Ray(network="import:tests.many_examples:Missing")
    [one] = submitting.submit([file], engine)
    until(lambda: engine.state(one.id).is_over, "it ends")
    assert engine.state(one.id) is State.FAILED
    assert "Missing" in engine.reason(one.id)
    arguments = [sys.executable, "-m", "gift", "logs", one.id]
    own = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    said = subprocess.run(arguments, env=own, capture_output=True, text=True, check=True)
    assert said.stdout.count("Missing") == Path(one.folder, "output.log").read_text().count(
        "Missing"
    )


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "GPUs": ({"gpus": 4}, {}, "resources: no node has 4 GPUs"),
    "several": ({"cpus": 64, "memory": "900GB"}, {}, "64 processors and 900GB of memory"),
    "an option": ({}, {"partition": "long"}, "Ray has no option partition"),
    "an address": ({}, {"address": "http://127.0.0.1:8199"}, "Failed to connect to Ray"),
}  # fmt: skip


@pytest.mark.parametrize(("resources", "options", "expected"), WRONG.values(), ids=WRONG)
def test_what_the_cluster_lacks_is_said_before_anything_is_queued(
    ray: Any,
    resources: dict[str, Any],
    options: dict[str, Any],
    expected: str,
    tmp_path: Path,
) -> None:
    # A client that knows the cluster, since the refused one may not reach any.
    assert_refused(Ray(options, NETWORK), resources, expected, tmp_path, Ray())


def test_it_listens_on_the_loopback_and_asks_for_a_token(ray: Any) -> None:
    """By the kernel's table of sockets, and by a request without a token."""
    listening = sockets_of(processes("/ray/") + processes("ray::"))
    assert len(listening) >= 5
    assert {host for host, _ in listening} <= {"0100007F", "0000000000000000FFFF00000100007F"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{LOCAL}/api/jobs/")
    assert error.value.code == 401


def sockets_of(numbers: list[int]) -> set[tuple[str, int]]:
    """The addresses at which these processes listen, as /proc/net has them."""
    own = set()
    for number in numbers:
        for link in Path(f"/proc/{number}/fd").glob("*"):
            try:
                own.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                host, _, port = fields[1].partition(":")
                found.add((host, int(port, 16)))
    return found


def test_a_cluster_that_is_killed_leaves_runs_that_go_on(ray: Any, tmp_path: Path) -> None:
    """SIGKILL of Ray's schedulers ends the cluster; the next submission starts another."""
    [file] = write_jobs(tmp_path, ["left"], epochs=60)
    [one] = submitting.submit([file], Ray(network=NETWORK))
    folder = Path(one.folder)
    until(lambda: has_begun(folder), "it begins")
    ray.kill()
    until(lambda: not processes("gift task", str(folder)), "the run ends with its cluster")
    rows, silent = submitting.jobs()
    [row] = [row for row in rows if row.id == one.id]
    assert row.state is State.UNKNOWN
    assert "Ray does not answer" in silent[0]
    again = submitting.resume(one.id)
    engine = Ray()
    until(lambda: engine.state(again.id).is_over, "it ends")
    assert engine.state(again.id) is State.DONE
    assert_same(weights(folder), alone(file))
