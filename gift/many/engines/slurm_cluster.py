"""Runs under Slurm, by submitit."""

import math
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gift.errors import JobError
from gift.jobs.models import Job, Resources
from gift.many.engines.base import Listed, State
from gift.many.engines.scheduler import Scheduler, unmet
from gift.many.engines.watched import Watched
from gift.many.task import read_task
from gift.support.optional import require

_PREFIX = "gift-"
_FIELDS = "%i|%T|%r|%M|%j|%k"
_STATES = {
    "PENDING": State.QUEUED, "CONFIGURING": State.QUEUED, "SUSPENDED": State.QUEUED,
    "REQUEUED": State.QUEUED, "REQUEUE_HOLD": State.QUEUED, "REQUEUE_FED": State.QUEUED,
    "SPECIAL_EXIT": State.QUEUED, "RUNNING": State.RUNNING, "COMPLETING": State.RUNNING,
    "STAGE_OUT": State.RUNNING, "SIGNALING": State.RUNNING, "STOPPED": State.QUEUED,
    "RESIZING": State.RUNNING, "COMPLETED": State.DONE, "CANCELLED": State.CANCELLED,
}  # fmt: skip

# A batch script whose step was killed is queued again, but not one that was cancelled. Slurm's own
# count of restarts has those at the time limit in it.
_TEARDOWN = [
    "code=$?",
    "deaths={place}/$SLURM_JOB_ID.deaths",
    'if [ $code -gt 128 ] && [ "$(cat $deaths 2>/dev/null | wc -l)" -lt 3 ]; then',
    "  for i in $(seq 60); do  # the scheduler may be down for a while",
    "    state=$(squeue -h -j $SLURM_JOB_ID -o %T) && break",
    "    sleep 5",
    "  done",
    '  [ "$state" = RUNNING ] && date >> $deaths && scontrol requeue $SLURM_JOB_ID',
    "fi",
    "exit $code",
]


class Slurm(Scheduler):
    """Each run is a job of Slurm, on nodes that see the same files and the same Python.

    Shortly before its time limit, a run writes a checkpoint and is queued again. So is a run
    whose processes are killed.

    Args:
        options: options of ``sbatch`` by name, such as ``partition`` or ``account``.
        network: ``import:package.module:function``, for jobs that name no network.
    """

    name = "slurm"
    title = "Slurm"

    def problems(self, jobs: Sequence[Job]) -> list[str]:
        """Return what would keep jobs from running; empty if nothing is known."""
        try:
            require("submitit", "slurm")
        except ImportError as error:
            return [str(error)]
        if missing := [tool for tool in ("sbatch", "squeue", "srun") if not shutil.which(tool)]:
            return [
                f"there is no {' or '.join(missing)} here: submit from a machine of the cluster"
            ]
        try:
            rows = _slurm("sinfo", "-h", "-o", "%R|%l|%c|%m|%G").splitlines()
        except JobError as error:
            return list(error.problems)
        nodes = [_Nodes(*row.split("|")) for row in rows if row.count("|") == 4]
        wanted = self.options.get("partition")
        if wanted is not None and wanted not in {node.partition for node in nodes}:
            known = ", ".join(sorted({node.partition for node in nodes})) or "none"
            return [f"there is no partition {wanted!r}, there are: {known}"]
        fitting = [node for node in nodes if wanted in (None, node.partition)]
        needs = dict.fromkeys(job.resources for job in jobs)
        return [
            problem
            for need in needs
            if (problem := _unmet(need, fitting))
        ]  # fmt: skip

    def queue(self, folders: Sequence[Path]) -> list[str]:
        """Queue runs; those with the same resources are one array."""
        submitit = require("submitit", "slurm")
        found: dict[Path, str] = {}
        groups: dict[Resources, list[Path]] = {}
        for folder in folders:
            groups.setdefault(read_task(folder).resources, []).append(folder)
        for resources, group in groups.items():
            place = group[0] if len(group) == 1 else group[0].parent
            executor = submitit.SlurmExecutor(
                folder=place / "slurm", python=sys.executable, max_num_timeout=10**6
            )
            common = _parameters(resources, place / "slurm") | self.options
            if len(group) == 1:
                executor.update_parameters(**_named(group[0]), **common)
                found[group[0]] = executor.submit(_Run(group[0], resources, self.network)).job_id
                continue
            name = {"job_name": f"{_PREFIX}array", "comment": str(place)}
            executor.update_parameters(**name, **common)
            runs = [_Run(folder, resources, self.network) for folder in group]
            for folder, job in zip(group, executor.map_array(_called, runs), strict=True):
                found[folder] = job.job_id
        return [found[folder] for folder in folders]

    def ask(self) -> list[Listed]:
        """Return what Slurm knows of this user's runs."""
        lines = _slurm("squeue", "--me", "-h", "-r", "-t", "all", "-o", _FIELDS).splitlines()
        return [_listed(line) for line in lines if line.split("|")[4:5] and _is_own(line)]

    def cancel(self, handle: str) -> None:
        """Cancel a run."""
        _slurm("scancel", handle)


class _Nodes:
    """A kind of nodes, as ``sinfo`` describes it."""

    def __init__(self, partition: str, limit: str, cpus: str, memory: str, gres: str) -> None:
        self.partition = partition
        self.minutes = _minutes(limit)
        self.cpus, self.megabytes = (int(text.rstrip("+") or 0) for text in (cpus, memory))
        parts = [part.partition("(")[0].split(":") for part in gres.split(",")]
        self.gpus = sum(int(p[-1]) for p in parts if p[0] == "gpu" and p[-1].isdigit())


def _unmet(need: Resources, nodes: Sequence[_Nodes]) -> str:
    """Return which resources no node has; empty if one has them all."""
    needs: dict[str, Callable[[_Nodes], bool]] = {
        f"{need.cpus} processors": lambda node: node.cpus >= need.cpus,
        f"{need.gpus} GPUs": lambda node: node.gpus >= need.gpus,
        f"{need.memory} of memory": lambda node: node.megabytes >= (need.megabytes or 0),
        f"{need.hours} hours": lambda node: node.minutes >= 60 * (need.hours or 0),
    }
    return unmet(needs, nodes)


def _minutes(limit: str) -> float:
    """Return a time limit of Slurm, ``[days-]hours:minutes:seconds``, in minutes."""
    if not limit[:1].isdigit():
        return math.inf
    days, _, rest = limit.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    parts = [0.0] * (3 - len(parts)) + parts
    return 24 * 60 * float(days or 0) + 60 * parts[0] + parts[1] + parts[2] / 60


def _parameters(resources: Resources, place: Path) -> dict[str, Any]:
    """Return the options of ``sbatch`` for resources.

    Args:
        resources: what a run takes.
        place: folder of submitit's own files.
    """
    teardown = [line.replace("{place}", shlex.quote(str(place))) for line in _TEARDOWN]
    own: dict[str, Any] = {
        "nodes": 1, "ntasks_per_node": 1, "cpus_per_task": resources.cpus, "use_srun": True,
        "teardown": teardown, "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},
    }  # fmt: skip
    if resources.gpus:
        own["gpus_per_node"] = resources.gpus
    if resources.megabytes is not None:
        own["mem"] = f"{resources.megabytes}MB"
    if resources.hours is not None:
        own["time"] = max(1, math.ceil(60 * resources.hours))
        own["signal_delay_s"] = int(min(90, 30 * own["time"]))
    else:
        own["time"] = None  # that of the partition
    return own


def _named(folder: Path) -> dict[str, Any]:
    return {"job_name": f"{_PREFIX}{folder.name}", "comment": str(folder)}


def _called(run: "_Run") -> None:
    run()


class _Run:
    """What a job of Slurm does.

    Args:
        folder: folder of the run.
        resources: its resources.
        network: see `Slurm`.
    """

    def __init__(self, folder: Path, resources: Resources, network: str | None) -> None:
        self.folder = folder
        self.watched = Watched(folder, resources.processes, network, _ignore_warning)

    def __call__(self) -> None:
        try:
            self.watched.run()
        finally:
            _ignore_warning()  # which would kill this process, now that nothing can be stopped

    def checkpoint(self, *arguments: Any) -> Any:
        """Stop the run, which writes a checkpoint; submitit then queues it again."""
        helpers = require("submitit.helpers", "slurm")
        self.watched.stop()
        return helpers.DelayedSubmission(self, *arguments)


def _ignore_warning() -> None:
    """Let this process ignore Slurm's warning of its time limit, which all processes get."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _is_own(line: str) -> bool:
    return line.split("|")[4].startswith(_PREFIX)


def _listed(line: str) -> Listed:
    number, state, reason, elapsed, name, comment = line.split("|", 5)
    folder = Path(comment) if comment not in ("", "(null)") else None
    if folder is not None and name == f"{_PREFIX}array":
        folder = _of_array(number, folder)
    known = _STATES.get(state.partition(" ")[0].rstrip("+"), State.FAILED)
    waits = known is State.QUEUED and reason not in ("None", "(null)")
    note = reason if waits else state.lower() if known is State.FAILED else ""
    return Listed(number, "slurm", known, folder, elapsed, note)


def _of_array(number: str, place: Path) -> Path | None:
    """Return the folder of a part of an array, from what submitit stored for it."""
    pickled = place / "slurm" / f"{number}_submitted.pkl"
    with suppress(Exception):
        run = require("submitit.core.utils", "slurm").DelayedSubmission.load(pickled).args[0]
        return Path(run.folder)
    return None


def _slurm(*command: str) -> str:
    """Call a command of Slurm.

    Raises:
        JobError: with its own words, if it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise JobError("Slurm is not installed here", [f"there is no {command[0]}"]) from None
    except subprocess.TimeoutExpired:
        raise JobError("Slurm does not answer", [f"{command[0]} took more than 60 s"]) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise JobError("Slurm does not answer", said.splitlines()[:3])
    return done.stdout
