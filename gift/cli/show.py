"""``gift show``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.plain import say
from gift.files import inspect


def show(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FILE", help="the folder of a run, or a file that gift.save wrote"
        ),
    ],
    everything: Annotated[bool, typer.Option("--all", help="list every tensor or epoch")] = False,
) -> None:
    """Describe a run, or the delta in a file: what it changes, how, and for which base."""
    if place.is_dir():
        from gift.jobs import Run
        from gift.jobs.showing import run_text

        say(run_text(Run(place), everything))
        return
    delta = inspect(place)
    say(f"{delta.summary()}\n\n{delta.details()}" if everything else str(delta))
