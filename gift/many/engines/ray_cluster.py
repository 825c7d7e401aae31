"""Runs on Ray, by Ray Jobs."""

import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gift.errors import JobError
from gift.jobs.models import Job, Resources
from gift.many.engines import ray_job
from gift.many.engines.base import RESTARTS, Listed, State
from gift.many.engines.scheduler import Scheduler, unmet
from gift.many.task import read_task
from gift.support.optional import require

LOCAL = "http://127.0.0.1:8265"
"""Where the cluster of this machine answers, which is started if nothing does."""

_FOLDER = "gift-folder"  # name of what Ray keeps with a job
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # before any other address, as Ray has it
_STATES = {
    "PENDING": State.QUEUED, "RUNNING": State.RUNNING, "STOPPED": State.CANCELLED,
    "SUCCEEDED": State.DONE, "FAILED": State.FAILED,
}  # fmt: skip
_SENT = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME")
_STORE = 100_000_000  # bytes for Ray's objects, of which runs have none


class Ray(Scheduler):
    """Each run is a job of Ray, on nodes that see the same files and the same Python.

    The driver of the job, on the head node, takes no resources: it gives the run to Ray as a task
    with the resources of the job, which waits as long as it must, and which Ray starts again on
    any node if its worker or its node is lost.

    Args:
        options: ``address`` of a cluster, such as "http://127.0.0.1:8265". Without it, the cluster
            of this machine is taken, and started if there is none: on the loopback, with a token.
        network: ``import:package.module:function``, for jobs that name no network.
    """

    name = "ray"
    title = "Ray"

    def __init__(
        self, options: Mapping[str, Any] | None = None, network: str | None = None
    ) -> None:
        super().__init__(options, network)
        given = next((os.environ[name] for name in _ADDRESSES if os.environ.get(name)), None)
        if given is not None:
            self.options["address"] = given
        self._client: Any = None
        _use_token(make=False)

    @property
    def address(self) -> str:
        """The address of the cluster."""
        return str(self.options.get("address") or LOCAL)

    @property
    def is_local(self) -> bool:
        """Whether it is the cluster of this machine, which may be started."""
        return self.options.get("address") is None

    def problems(self, jobs: Sequence[Job]) -> list[str]:
        """Return what would keep jobs from running; empty if nothing is known."""
        _use_token(self.is_local)
        try:
            require("ray.job_submission", "ray")
        except ImportError as error:
            return [str(error)]
        if unknown := self.options.keys() - {"address"}:
            return [f"Ray has no option {', '.join(sorted(unknown))}, only address"]
        try:
            if self.is_local and not self._answers():
                nodes = [{"CPU": float(processors()), "GPU": float(_gpus())}]
            else:
                nodes = self._nodes()
        except JobError as error:
            return list(error.problems)
        if not self.is_local:
            return []  # an autoscaler may add nodes that fit
        needs = dict.fromkeys(job.resources for job in jobs)
        return [problem for need in needs if (problem := _unmet(need, nodes))]

    def start_all(self, folders: Sequence[Path]) -> list[str]:
        """Queue several runs, and start the cluster of this machine if there is none."""
        _use_token(self.is_local)
        if self.is_local and not self._answers():
            start_local()
        return super().start_all(folders)

    def queue(self, folders: Sequence[Path]) -> list[str]:
        """Queue runs, each as a job of its own."""
        with _in_words():
            return [self._submit(folder) for folder in folders]

    def _submit(self, folder: Path) -> str:
        needs = read_task(folder).resources
        options: dict[str, Any] = {"num_cpus": needs.cpus, "num_gpus": needs.gpus}
        options |= {"max_retries": RESTARTS}
        if needs.megabytes is not None:
            options["memory"] = needs.megabytes * 10**6
        arguments = json.dumps([options, str(folder), needs.processes, self.network])
        command = shlex.join([sys.executable, "-P", ray_job.__file__, arguments])
        sent = {name: os.environ[name] for name in _SENT if name in os.environ}
        sent["RAY_JOB_STOP_WAIT_TIME_S"] = str(int(self.patience))  # for a checkpoint
        number = self.client().submit_job(
            entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {command}",
            runtime_env={"env_vars": sent},
            metadata={_FOLDER: str(folder)},
        )
        return str(number)

    def ask(self) -> list[Listed]:
        """Return what Ray knows of gift's runs."""
        with _in_words():
            jobs = [job for job in self.client().list_jobs() if _FOLDER in (job.metadata or {})]
            tasks = self._tasks() if any(job.status.value == "RUNNING" for job in jobs) else {}
        jobs.sort(key=lambda job: job.start_time or 0)
        return [_listed(job, tasks.get(job.job_id)) for job in jobs]

    def cancel(self, handle: str) -> None:
        """Cancel a run."""
        with _in_words():
            self.client().stop_job(handle)

    def client(self) -> Any:
        """Return Ray's client for jobs."""
        if self._client is None:
            module = require("ray.job_submission", "ray")
            self._client = module.JobSubmissionClient(self.address)
        return self._client

    def _answers(self) -> bool:
        try:
            with _in_words():
                self.client().get_version()
        except JobError as error:
            if not isinstance(error.__cause__, ConnectionError):
                raise
            self._client = None
            return False
        return True

    def _nodes(self) -> list[dict[str, float]]:
        with _in_words():
            state = require("ray.util.state", "ray")
            nodes = state.list_nodes(address=self.client().get_address(), detail=True)
        return [node.resources_total for node in nodes if node.state == "ALIVE"]

    def _tasks(self) -> dict[str, str]:
        """Return the states of the tasks of gift's runs, by Ray's number of their job."""
        state = require("ray.util.state", "ray")
        tasks = state.list_tasks(
            address=self.client().get_address(), limit=10_000, raise_on_missing_output=False,
            filters=[("name", "=", ray_job.TASK)],
        )  # fmt: skip
        tasks.sort(key=lambda task: task.attempt_number)
        return {task.job_id: task.state for task in tasks}


def start_local(cpus: int | None = None) -> None:
    """Start Ray on this machine: it listens on the loopback alone, and asks for a token.

    It runs until ``ray stop``.

    Args:
        cpus: number of processors; None takes all.

    Raises:
        JobError: with Ray's own words, if it does not start.
    """
    _use_token(True)
    host, _, port = LOCAL.rpartition("/")[2].partition(":")
    command = [
        *_ray(), "start", "--head", "--include-dashboard=true", f"--dashboard-host={host}",
        f"--dashboard-port={port}", f"--num-cpus={cpus or processors()}",
        f"--object-store-memory={_STORE}", "--disable-usage-stats",
    ]  # fmt: skip
    # With this variable, meant for systems where other machines cannot join, all of Ray listens
    # on the loopback; else it does so on all interfaces, whatever --node-ip-address says.
    own = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with tempfile.TemporaryFile() as log:  # a pipe would be held open by Ray's processes
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=own,
            start_new_session=True, check=False,
        )  # fmt: skip
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise JobError("Ray did not start here", said[-5:])


def processors() -> int:
    """Return the number of processors that this process may use."""
    own = getattr(os, "sched_getaffinity", None)
    return len(own(0)) if own is not None else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _ray() -> list[str]:
    """Return the command ``ray`` of this Python, which need not be on the path."""
    for point in entry_points(group="console_scripts", name="ray"):
        return [sys.executable, "-c", f"from {point.module} import {point.attr}; {point.attr}()"]
    raise JobError("Ray is not installed here", ["there is no command ray"])


def _use_token(make: bool) -> None:
    """Switch Ray's token authentication on, unless the user has decided.

    It must be done before Ray is imported, which reads the variable then.

    Args:
        make: whether a token is made if there is none.
    """
    if "RAY_AUTH_MODE" in os.environ or importlib.util.find_spec("ray") is None:
        return
    own = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not own and not (Path.home() / ".ray" / "auth_token").is_file():
        if not make:
            return
        command = [*_ray(), "get-auth-token", "--generate"]
        subprocess.run(command, capture_output=True, check=True)
    os.environ["RAY_AUTH_MODE"] = "token"


@contextmanager
def _in_words() -> Iterator[None]:
    """Context in which errors of Ray's clients are `JobError`."""
    import requests

    exceptions = require("ray.exceptions", "ray")
    try:
        yield
    except (OSError, RuntimeError, requests.RequestException, exceptions.RayError) as error:
        said = str(error).strip().splitlines()
        silent = isinstance(error, ConnectionError | requests.RequestException)
        what = "Ray does not answer" if silent else "Ray answered with an error"
        raise JobError(what, said[:3] or [type(error).__name__]) from error


def _unmet(need: Resources, nodes: Sequence[Mapping[str, float]]) -> str:
    """Return what of the resources no node of the cluster has; empty if one has all."""
    wanted: dict[str, tuple[str, float]] = {"CPU": (f"{need.cpus} processors", need.cpus)}
    if need.gpus:
        wanted["GPU"] = (f"{need.gpus} GPUs", need.gpus)
    if need.megabytes is not None:
        wanted["memory"] = (f"{need.memory} of memory", need.megabytes * 10**6)
    return unmet({what: _has(name, least) for name, (what, least) in wanted.items()}, nodes)


def _has(name: str, least: float) -> Callable[[Mapping[str, float]], bool]:
    """Return whether a node has that much of a resource."""
    otherwise = math.inf if name == "memory" else 0  # it is unknown before Ray is started
    return lambda node: node.get(name, otherwise) >= least


def _listed(job: Any, task: str | None) -> Listed:
    state = _STATES[job.status.value]
    if state is State.RUNNING and (task is None or task.startswith("PENDING")):
        state = State.QUEUED  # its driver runs, and waits for the resources of its task
    note = ""
    if state is State.FAILED:
        lines = (job.message or "").strip().splitlines()
        note = lines[-1] if lines else ""
    elif state is State.QUEUED:
        note = "waits for its resources" if task is not None else "starts"
    ends = job.end_time or time.time() * 1000
    elapsed = str(timedelta(seconds=max(0, int((ends - job.start_time) / 1000))))
    return Listed(
        job.submission_id, "ray", state, Path(job.metadata[_FOLDER]), elapsed, note
    )  # fmt: skip
