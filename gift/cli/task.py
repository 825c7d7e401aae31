"""``gift task``: what engines start; it is not listed."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import NETWORK, own_network
from gift.cli.plain import say


def task(
    job: Annotated[Path, typer.Argument(metavar="JOB")],
    network: NETWORK = None,
    attended: Annotated[
        bool, typer.Option("--attended", help="end when the standard input is closed")
    ] = False,
) -> None:
    """Run a job, or a part of a search, and write what came of it as result.json."""
    from gift.jobs import read_job
    from gift.many.engines.base import SEARCH_FILE
    from gift.many.parts import run_part
    from gift.many.task import end_with_input, run_task

    if attended:
        end_with_input()
    if (job.parent / SEARCH_FILE).is_file():
        run_part(job.parent, network, say)
        return
    settled = read_job(job)
    run_task(settled, own_network(network, settled))
