"""Slurm and Ray on this machine, for tests: started on the loopback, and ended.

``python -m tests.engines.up`` starts Slurm with two processors until the standard input
closes. It needs root, and Debian's packages slurm-wlm and munge.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CPUS = 2
_CONFIG = """
ClusterName=gifttest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
KillWait=20
OverTimeLimit=0
SlurmdTimeout=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=60 State=UP
"""


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
    """Kill processes by SIGKILL."""
    assert numbers, "there is nothing to kill"
    for number in numbers:
        os.kill(number, signal.SIGKILL)


def missing_for_slurm() -> str:
    """Why Slurm cannot be started here; empty if it can."""
    tools = [t for t in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(t) is None]
    if tools:
        return f"there is no {', '.join(tools)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root here"


class LocalSlurm:
    """One node of Slurm in a folder, on the loopback.

    Args:
        folder: folder of its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self.config = folder / "slurm.conf"
        self.config.write_text(_CONFIG.format(folder=folder, host=host, cpus=CPUS))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.environment = {"SLURM_CONF": str(self.config)}

    def start(self, name: str) -> None:
        """Start a daemon: munged, slurmctld or slurmd."""
        commands = {
            "munged": ["munged", "-F", f"--key-file={self.folder}/munge.key",
                       f"--socket={self.folder}/munge.socket",
                       f"--pid-file={self.folder}/munged.pid",
                       f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/seed",
                       "--force"],
            "slurmctld": ["slurmctld", "-D"],
            "slurmd": ["slurmd", "-D"],
        }  # fmt: skip
        with (self.folder / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                commands[name], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | self.environment,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until the node takes jobs."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            done = subprocess.run(
                ["sinfo", "-h", "-o", "%t"], capture_output=True, text=True, check=False,
                env=os.environ | self.environment,
            )  # fmt: skip
            if done.stdout.strip() in ("idle", "mix", "alloc"):
                return
            time.sleep(0.5)
        logs = "\n".join(f"{p}:\n{p.read_text()[-1500:]}" for p in self.folder.glob("*.log"))
        raise RuntimeError(f"Slurm did not start: {done.stdout} {done.stderr}\n{logs}")

    def kill(self, name: str) -> None:
        """Kill a daemon by SIGKILL."""
        self.processes[name].kill()
        self.processes[name].wait()

    def end(self) -> None:
        """Cancel all jobs and end the daemons."""
        with suppress(Exception):
            subprocess.run(["scancel", "--me", "-f"], env=os.environ | self.environment, timeout=20)
            time.sleep(1)
        for name in ("slurmd", "slurmctld", "munged"):
            process = self.processes.get(name)
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


@contextmanager
def local_slurm() -> Iterator[LocalSlurm]:
    """Context with Slurm on this machine; the environment leads to it."""
    folder = Path(tempfile.mkdtemp(prefix="gift-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    slurm = LocalSlurm(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ |= slurm.environment
    try:
        slurm.start("munged")
        time.sleep(1)
        slurm.start("slurmctld")
        slurm.start("slurmd")
        slurm.wait()
        yield slurm
    finally:
        slurm.end()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def missing_for_ray() -> str:
    """Why Ray cannot be started here; empty if it can."""
    if importlib.util.find_spec("ray") is None:
        return "there is no Ray: pip install gift-torch[ray]"
    with socket.socket() as taken:
        is_taken = taken.connect_ex(("127.0.0.1", 8265)) == 0
    return "something listens at port 8265 already, perhaps another Ray" if is_taken else ""


class LocalRay:
    """Ray on this machine, as gift starts it."""

    def start(self) -> None:
        """Start it with two processors."""
        from gift.many.engines.ray_cluster import start_local

        start_local(CPUS)

    def kill(self) -> None:
        """Kill what schedules by SIGKILL, and wait until the cluster is gone."""
        kill(processes("/gcs_server") + processes("/raylet/raylet"))
        end = time.monotonic() + 120
        while time.monotonic() < end and missing_for_ray():
            time.sleep(1)

    def end(self) -> None:
        """Stop all of it."""
        tool = Path(sys.executable).with_name("ray")
        subprocess.run([str(tool), "stop", "--force"], capture_output=True, timeout=120, check=True)


@contextmanager
def local_ray() -> Iterator[LocalRay]:
    """Context with Ray on this machine."""
    ray = LocalRay()
    try:
        ray.start()
        yield ray
    finally:
        ray.end()


if __name__ == "__main__":
    with local_slurm() as started:
        print(f"export SLURM_CONF={started.config}", flush=True)
        sys.stdin.read()
