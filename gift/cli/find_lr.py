"""``gift find-lr``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.finetune import read_or_guess
from gift.cli.options import ALLOW_IMPORT, NETWORK, SET, is_code, own_network
from gift.cli.plain import say


def find_lr(
    job: Annotated[Path, typer.Argument(metavar="JOB|FOLDER|TABLE", help="as for gift finetune")],
    changes: SET = None,
    network: NETWORK = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="write losses over learning rates")
    ] = None,
    steps: Annotated[int, typer.Option(help="number of learning rates to try", min=3)] = 100,
    allow_import: ALLOW_IMPORT = False,
) -> None:
    """Suggest a learning rate for a job: all are tried once, and nothing is kept."""
    from gift.jobs.running import find_lr_of

    settled = read_or_guess(job, changes or [], network)
    name = network if is_code(network) else None
    own = own_network(name, settled, Path(settled.folder), allow_import)
    found = find_lr_of(settled, own, steps)
    if plot is not None:
        found.plot(plot)
    say(str(found))
