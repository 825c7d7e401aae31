"""``gift push``."""

from typing import Annotated

import typer

from gift.cli.options import DELTA, RUN
from gift.cli.plain import say


def push(
    run: RUN,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="repository of the Hugging Face hub")
    ],
    delta: DELTA = None,
    private: Annotated[
        bool, typer.Option("--private", help="make it private, if it is new")
    ] = False,
    message: Annotated[str, typer.Option(help="of the commit")] = "Upload by gift",
) -> None:
    """Upload the delta of a run with its model card; the token is that of huggingface-cli login."""
    from gift.jobs import Run
    from gift.jobs.cards import pushed

    say(f"the delta is at {pushed(Run(run), repository, delta, private, message)}")
