"""Submissions: runs that were given to an engine, which this machine remembers."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gift.errors import JobError
from gift.many.engines.scheduler import Scheduler
from gift.support.atomic_files import write_text

ENGINES = ("ray", "slurm")
_STATE = "GIFT_STATE"


@dataclass(frozen=True)
class Submission:
    """A run that was given to an engine.

    Args:
        id: what the engine calls it.
        engine: name of the engine.
        folder: folder of the run.
        options: options of the engine, see `engine_of`.
        network: ``import:package.module:function``, for a job that names no network.
    """

    id: str
    engine: str
    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    network: str | None = None


def engine_of(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    network: str | None = None,
) -> Scheduler:
    """Return an engine.

    Args:
        name: "ray" or "slurm".
        options: by name: ``address`` of a cluster of Ray; options of ``sbatch``.
        network: ``import:package.module:function``, for jobs that name no network.

    Raises:
        JobError: if there is no such engine.
    """
    if name == "slurm":
        from gift.many.engines.slurm_cluster import Slurm

        return Slurm(options, network)
    if name == "ray":
        from gift.many.engines.ray_cluster import Ray

        return Ray(options, network)
    raise JobError(f"there is no engine {name!r}", [f"expected one of {', '.join(ENGINES)}"])


def state_folder() -> Path:
    """Return the folder in which submissions are remembered, ``GIFT_STATE`` or that of the user."""
    if own := os.environ.get(_STATE):
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "gift"


def remember(one: Submission) -> None:
    """Remember a submission, beyond the end of this process."""
    name = f"{one.engine}-{one.id}.json".replace("/", "-")
    write_text(state_folder() / name, json.dumps(asdict(one)) + "\n")


def remembered() -> list[Submission]:
    """Return what was submitted from this machine, oldest first."""
    found = []
    for file in sorted(state_folder().glob("*.json"), key=lambda file: file.stat().st_mtime):
        try:
            found.append(Submission(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return found


def find(name: str) -> Submission:
    """Return a submission by its id or by the folder of its run; the newest, if there are several.

    Raises:
        JobError: if there is none.
    """
    place = str(Path(name).expanduser().resolve())
    own = [one for one in remembered() if name == one.id or place == one.folder]
    if not own:
        known = ", ".join(one.id for one in remembered()[-5:]) or "none"
        raise JobError(f"nothing was submitted as {name}", [f"the last ones are: {known}"])
    return own[-1]


def engine_for(one: Submission) -> Scheduler:
    """Return the engine of a submission."""
    return engine_of(one.engine, options=one.options, network=one.network)
