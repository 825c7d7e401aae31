"""``gift submit``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import ADDRESS, NETWORK, ON, SBATCH, chosen_engine
from gift.cli.plain import say


def submit(
    jobs: Annotated[
        list[Path],
        typer.Argument(metavar="JOB...", help="job files, search files, or folders of them"),
    ],
    on: ON = "slurm",
    sbatch: SBATCH = None,
    address: ADDRESS = None,
    network: NETWORK = None,
) -> None:
    """Queue jobs on a cluster; nothing is queued if anything would keep one from running."""
    from gift.many import submit as queue

    made = queue(jobs, chosen_engine(on, sbatch, address, network))
    for one in made:
        say(f"{one.id}: {one.folder}")
    say("see gift jobs" if made else "all of them are done already")
