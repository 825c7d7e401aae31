"""The network of a job."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gift.errors import JobError
from gift.jobs.models import Job
from gift.support.atomic_files import write_text
from gift.zoo import LoadedNetwork, load_network


def job_network(job: Job, network: Any = None) -> LoadedNetwork:
    """Load the network of a job, with its reader and classes.

    Random parts are drawn from the job's seed, so that opening a run gives the same network again.

    Args:
        job: the job.
        network: replaces the network that the job names: a module, or a `gift.zoo.LoadedNetwork`.

    Raises:
        JobError: if there is none.
    """
    if isinstance(network, nn.Module):
        return LoadedNetwork(network, None, job.data.task)
    if network is not None:
        return network
    if job.network is None:
        problem = "network: name one, or give it on the command line or in code"
        raise JobError("the job names no network", [problem])
    return named_network(
        job.network.name, job.network.weights, job.data.task, job.training.seed or 0,
        **job.network.options,
    )  # fmt: skip


def named_network(
    name: str, weights: str | None, task: str | None, seed: int = 0, **options: Any
) -> LoadedNetwork:
    """Call `gift.zoo.load_network`, with random parts drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return load_network(name, weights, task=task, **options)


CODE = "network.txt"
"""File in the folder of a run with the name of the function that makes its network."""


def remember_code(folder: Path, name: str | None) -> None:
    """Note in the folder of a run that its network is made by own code; None removes the note."""
    if name is None:
        (folder / CODE).unlink(missing_ok=True)
    else:
        write_text(folder / CODE, f"{name}\n")


def remembered_code(folder: Path, allow_import: bool) -> str | None:
    """Return the name of the function that makes the network of a run; None if there is none.

    Raises:
        JobError: if there is one, unless `allow_import`.
    """
    if not (folder / CODE).is_file():
        return None
    name = (folder / CODE).read_text(encoding="utf-8").strip()
    if not name.startswith("import:"):
        raise JobError(f"{folder / CODE} cannot be read", ["expected import:module:function"])
    if not allow_import:
        problem = f"{name!r} is code: allow it to be run by --allow-import, or name another network"
        raise JobError(f"the network of {folder} is made by own code", [problem])
    return name
