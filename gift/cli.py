"""The command ``gift``."""

import sys
from pathlib import Path
from typing import Annotated, Any

from gift.files import DeltaFileError, inspect


def main() -> None:
    """Run the command line."""
    try:
        import typer
    except ImportError:
        sys.exit('the command line needs typer: pip install "gift[cli]"')
    _commands(typer)()


def _commands(typer: Any) -> Any:
    app = typer.Typer(help="Fine-tuning by deltas.", no_args_is_help=True, add_completion=False)

    @app.callback()
    def gift() -> None:
        """Fine-tuning by deltas."""  # a callback, so that one command is a command all the same

    @app.command()
    def show(
        file: Annotated[Path, typer.Argument(help="a file that gift.save wrote")],
        everything: Annotated[bool, typer.Option("--all", help="list every tensor")] = False,
    ) -> None:
        """Describe the delta in a file: what it changes, how, and for which base."""
        try:
            delta = inspect(file)
        except (DeltaFileError, FileNotFoundError) as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        typer.echo(f"{delta.summary()}\n\n{delta.details()}" if everything else str(delta))

    return app
