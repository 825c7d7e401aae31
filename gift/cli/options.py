"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

RUN = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run", show_default=False)]
NETWORK = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="NAME",
        help="in the place of the network that the job names; import:package.module:function "
        "calls your own code",
    ),
]
DELTA = Annotated[
    str | None, typer.Option("--delta", metavar="best|last|FILE", help="which delta is taken")
]
DEVICE = Annotated[str | None, typer.Option("--device", help="of torch; default: that of the job")]
JSON = Annotated[bool, typer.Option("--json", help="print JSON")]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="change a setting; as often as needed"),
]


def own_network(name: str | None, job: Any) -> Any:
    """Load the network named on the command line, where code is allowed; None if none is named.

    Args:
        name: name of the network.
        job: job that it is for.
    """
    if name is None:
        return None
    from gift.jobs.networks import named_network

    return named_network(name, "default", job.data.task, job.training.seed or 0, allow_import=True)


def opened(folder: Path, network: str | None) -> Any:
    """Open the run in a folder."""
    from gift.jobs import Run

    run = Run(folder)
    run.base = own_network(network, run.job)
    return run
