"""``gift merge``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import ALLOW_IMPORT, DELTA, NETWORK, opened
from gift.cli.plain import say


def merge(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|DELTA", help="the folder of a run, or the file of a delta"),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help=".safetensors or .pt for the state of the network; for a network of transformers "
            "also a new folder",
        ),
    ],
    delta: DELTA = None,
    network: NETWORK = None,
    allow_import: ALLOW_IMPORT = False,
    weights: Annotated[str, typer.Option(help="of --network; a file, or default")] = "default",
    task: Annotated[str | None, typer.Option(help="of --network: classification, language")] = None,
) -> None:
    """Merge a delta into the weights of its network, and write these."""
    from gift.files import load
    from gift.jobs import JobError, write_merged
    from gift.jobs.cards import write_card
    from gift.jobs.networks import named_network
    from gift.jobs.runs import JOB

    classes = reader = run = None
    if source.is_file() and network is not None:
        net = named_network(network, weights, task, allow_import=True).net
        load(net, source)
    elif source.is_file() and not (source.parent / JOB).is_file():
        problem = "it is not in the folder of a run: say which network it is for (--network)"
        raise JobError(f"{source} cannot be merged", [problem])
    else:
        in_run = source.is_file()
        run = opened(source.parent if in_run else source, network, allow_import)
        net = run.network(source if in_run else delta)
        classes, reader = run.classes, run.reader
    path = write_merged(net, out, classes, reader)
    card = "" if run is None else f"; {write_card(run, path)} describes it"
    say(f"{path} has the merged network{card}")
