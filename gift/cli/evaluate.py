"""``gift evaluate``."""

import json
from typing import Annotated, Any

import typer
from tabulate import tabulate

from gift.cli.options import (
    ALLOW_IMPORT,
    CLASSES,
    DELTA,
    DEVICE,
    JSON,
    NETWORK,
    RUN,
    listed,
    opened,
)
from gift.cli.plain import say


def evaluate(
    run: RUN,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="where other examples of the same kind are; if several settings say it, "
            "NAME=VALUE for each",
        ),
    ] = None,
    classes: CLASSES = None,
    as_json: JSON = False,
    delta: DELTA = None,
    network: NETWORK = None,
    allow_import: ALLOW_IMPORT = False,
    device: DEVICE = None,
) -> None:
    """Evaluate the network of a run on the validation examples of its job, or on others."""
    opened_run = opened(run, network, allow_import)
    place = _place(data or [], opened_run.job.data.kind)
    values = opened_run.evaluate(place, delta, device, listed(classes))
    say(json.dumps(values) if as_json else tabulate(values.items(), tablefmt="plain"))


def _place(data: list[str], kind: str) -> Any:
    from gift.jobs import KINDS

    if not data:
        return None
    known = KINDS[kind].arguments()
    parts = [text.partition("=") for text in data]
    if all(name in known and equals for name, equals, _ in parts):
        return {name: value for name, _, value in parts}
    if len(data) > 1:
        raise typer.BadParameter("give one place, or NAME=VALUE for each", param_hint="--data")
    return data[0]
