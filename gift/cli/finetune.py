"""``gift finetune``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import NETWORK, SET, own_network
from gift.cli.plain import complain, say


def finetune(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="a job file, see gift init")],
    changes: SET = None,
    network: NETWORK = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="start over instead of resuming")
    ] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="resume although the examples changed")
    ] = False,
) -> None:
    """Run a job, or resume it if it was stopped."""
    from gift.jobs import read_job, run_job

    settled = read_job(job, changes or ())
    try:
        result = run_job(settled, own_network(network, settled), restart, accept_changed_data)
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # else the run has said where its checkpoint is
            complain("stopped; the same command resumes from the last checkpoint, if there is one")
        raise typer.Exit(130) from None
    say(f"{result}\n\nAll files are in {settled.folder}")
