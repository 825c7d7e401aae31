"""``gift show``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.plain import say
from gift.files import inspect


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a file that gift.save wrote")],
    everything: Annotated[bool, typer.Option("--all", help="list every tensor")] = False,
) -> None:
    """Describe the delta in a file: what it changes, how, and for which base."""
    delta = inspect(file)
    say(f"{delta.summary()}\n\n{delta.details()}" if everything else str(delta))
