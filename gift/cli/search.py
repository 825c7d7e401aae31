"""``gift search``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import ADDRESS, NETWORK, ON_OR_HERE, SBATCH, chosen_engine
from gift.cli.plain import complain, say


def search(
    file: Annotated[
        Path, typer.Argument(metavar="SEARCH", help="a search file: a job and what may vary in it")
    ],
    parallel: Annotated[
        int | None, typer.Option(help="number of trials at a time", min=1, show_default=False)
    ] = None,
    on: ON_OR_HERE = None,
    sbatch: SBATCH = None,
    address: ADDRESS = None,
    network: NETWORK = None,
) -> None:
    """Search for the best settings of a job, or continue a search that was stopped."""
    from gift.many import search as run_search

    engine = None if on is None else chosen_engine(on, sbatch, address, network)
    try:
        found = run_search(file, network=network, tell=say, engine=engine, parallel=parallel)
    except KeyboardInterrupt:
        complain("stopped; the same command continues the search")
        raise typer.Exit(130) from None
    say(f"\n{found}")
