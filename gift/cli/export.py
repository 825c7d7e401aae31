"""``gift export``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import ALLOW_IMPORT, DELTA, NETWORK, RUN, opened
from gift.cli.plain import say


def export(
    run: RUN,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help=".onnx, or .pt2 for an exported program of torch")
    ],
    delta: DELTA = None,
    network: NETWORK = None,
    allow_import: ALLOW_IMPORT = False,
) -> None:
    """Write the network of a run, with its delta merged, as a program that needs no gift."""
    from gift.jobs.cards import write_card
    from gift.jobs.exporting import example_batch, write_exported

    its = opened(run, network, allow_import)
    path, inputs = write_exported(its.network(delta), out, example_batch(its))
    card = write_card(its, path)
    say(f"{path} has the network, which takes {inputs}; {card} describes it")
