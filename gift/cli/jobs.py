"""``gift jobs``."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from gift.cli.options import JSON
from gift.cli.plain import complain, say


def jobs(
    as_json: JSON = False,
    everything: Annotated[
        bool, typer.Option("--all", help="also runs that ended, other than the last ten")
    ] = False,
) -> None:
    """Show what was submitted, and its state as Ray or Slurm says it."""
    from gift.many import submitting

    rows, silent = submitting.jobs()
    if not everything:
        ended = [row for row in rows if row.state.is_over][:-10]
        rows = [row for row in rows if row not in ended]
    if as_json:
        plain = [{k: None if v is None else str(v) for k, v in asdict(r).items()} for r in rows]
        say(json.dumps(plain, indent=1))
    else:
        say(submitting.table(rows) if rows else "nothing was submitted from here")
    for text in silent:
        complain(text)
