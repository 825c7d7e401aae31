"""The commands of ``gift``, one file for each."""

from typing import Annotated

import typer

from gift.cli.cancel import cancel
from gift.cli.compare import compare
from gift.cli.evaluate import evaluate
from gift.cli.export import export
from gift.cli.fetch import fetch
from gift.cli.find_lr import find_lr
from gift.cli.finetune import finetune
from gift.cli.init import init
from gift.cli.jobs import jobs
from gift.cli.logs import logs
from gift.cli.merge import merge
from gift.cli.plain import in_plain_words
from gift.cli.predict import predict
from gift.cli.push import push
from gift.cli.resume import resume
from gift.cli.search import search
from gift.cli.show import show
from gift.cli.submit import submit
from gift.cli.suggest import suggest
from gift.cli.table import table
from gift.cli.task import task
from gift.version import __version__


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gift {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def gift(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="show the version")
    ] = False,
) -> None:
    """Fine-tune networks, and use the results."""


COMMANDS = (
    init, finetune, find_lr, predict, evaluate, show, table, suggest, merge, export, push,
    search, compare, submit, jobs, logs, cancel, resume, fetch,
)  # fmt: skip
for command in COMMANDS:
    app.command()(in_plain_words(command))
app.command(hidden=True)(in_plain_words(task))
