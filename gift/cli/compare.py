"""``gift compare``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import ADDRESS, NETWORK, ON_OR_HERE, SBATCH, SET, chosen_engine
from gift.cli.plain import complain, say


def compare(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="a job file, see gift init")],
    methods: Annotated[
        list[str],
        typer.Option(
            metavar="LIST",
            help="methods, with settings behind them: lora,lora:rank=8,dora,ia3,full,head",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="number of runs of each method", min=1)] = 3,
    folder: Annotated[Path, typer.Option(help="folder of the comparison")] = Path("comparison"),
    budget: Annotated[
        str | None,
        typer.Option(help="sizes that gift.suggest chooses: 100k, 1% or 2MB for each method"),
    ] = None,
    parallel: Annotated[int, typer.Option(help="number of runs at a time", min=1)] = 1,
    changes: SET = None,
    on: ON_OR_HERE = None,
    sbatch: SBATCH = None,
    address: ADDRESS = None,
    network: NETWORK = None,
) -> None:
    """Compare methods on a job; runs that are done are not repeated."""
    from gift.jobs import read_job
    from gift.many import compare as run_compare

    settled = read_job(job, changes or ())
    engine = None if on is None else chosen_engine(on, sbatch, address, network)
    try:
        made = run_compare(
            settled, methods, seeds, folder=folder, budget=budget, parallel=parallel,
            network=network, tell=say, engine=engine,
        )  # fmt: skip
    except KeyboardInterrupt:
        complain("stopped; the same command continues")
        raise typer.Exit(130) from None
    say(f"\n{made}\n\nAll files are in {made.folder}, see report.html")
