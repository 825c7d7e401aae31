"""``gift init``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.plain import say


def init(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="to write; none prints it")
    ] = None,
    kind: Annotated[str, typer.Option(help="how the examples are stored")] = "class_folders",
    strategy: Annotated[
        str, typer.Option(help="which part of the network is trained")
    ] = "RecommendedFineTuningStrategy",
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
) -> None:
    """Write a first job file: every setting with its default and description."""
    from gift.jobs import JobError, init_text
    from gift.support.atomic_files import write_text

    text = init_text(kind, strategy)
    if file is None:
        say(text.rstrip("\n"))
        return
    if file.exists() and not force:
        raise JobError(f"{file} is there already", ["choose another name, or --force"])
    write_text(file, text)
    say(f"{file} was written: edit it, then run gift finetune {file}")
