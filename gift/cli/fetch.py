"""``gift fetch``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import SUBMITTED
from gift.cli.plain import say


def fetch(
    name: SUBMITTED,
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder")],
) -> None:
    """Copy the results of a submitted run, without its checkpoint."""
    from gift.many import submitting

    files = submitting.fetch(name, to)
    say(f"{to} has {len(files)} files: gift predict {to} ...")
