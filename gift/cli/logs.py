"""``gift logs``."""

import time
from typing import Annotated

import typer

from gift.cli.options import SUBMITTED
from gift.cli.plain import say


def logs(
    name: SUBMITTED,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on until the run has ended")
    ] = False,
) -> None:
    """Print what a submitted run printed."""
    from gift.many import submissions, submitting

    file, one = submitting.log_of(name), submissions.find(name)
    engine = submissions.engine_for(one)
    at = 0
    while True:
        is_over = not follow or engine.state(one.id).is_over
        if file.is_file():
            with file.open("rb") as opened:
                opened.seek(at)
                new = opened.read()
            at += len(new)
            if new:
                typer.echo(new.decode(errors="replace"), nl=False)
        if is_over:
            break
        time.sleep(1)
    if not at:
        say(engine.reason(one.id) or "it has printed nothing yet")
