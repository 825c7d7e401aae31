"""Errors and warnings in a readable form."""

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from gift.errors import GiftWarning
from gift.training.distributed import rank

TRACEBACK = "GIFT_TRACEBACK"
_PLAIN = (FileNotFoundError, ImportError, ModuleNotFoundError, ValueError)


# What errors advise in Python, in the words of the command line.
_IN_COMMANDS: tuple[tuple[str, str], ...] = (
    (r"restart=True, --restart|--restart, restart=True", "--restart"),
    (r"accept_changed_data=True, --accept-changed-data", "--accept-changed-data"),
    (r"give the second data set classes=train\.classes", "name them for both: --classes A,B,..."),
    (r"give classes=train\.classes", "name them: --classes A,B,..."),
    (r"give their names, classes=\[\.\.\.\]", "give their names: --classes A,B,..."),
    (r"give\s+predict\(\.\.\., classes=\.\.\.\)", "is it the network of this run?"),
    (
        r"give it another head, strategy=merge_strategies\(\[HeadReplacementStrategy"
        r"\(num_classes=\d+\), \.\.\.\]\)",
        "give it another head: --set strategy.head=new",
    ),
    (r"(choose )?task='regression'", r"\1--set data.options.task=regression"),
    (
        r"give load_network\(\.\.\., reader=\.\.\.\)",
        "give its settings: --set data.reader.NAME=...",
    ),
    (r"precision='float32'", "--set training.precision=float32"),
    (r"the same call", "the same command"),
)


def in_plain_words(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command to report errors as a message and exit code 1, without a traceback.

    The environment variable GIFT_TRACEBACK asks for the traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.environ.get(TRACEBACK):
            command(*args, **kwargs)
            return
        try:
            with _plain_warnings():
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            complain("stopped")
            raise typer.Exit(130) from None
        except Exception as error:  # reported without a traceback
            complain(message(error))
            raise typer.Exit(1) from None

    return run


def message(error: Exception) -> str:
    """Return the text of an error; if it is not gift's, also its type and how to see more."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no {error.filename}"
    text = "\n".join([str(error), *getattr(error, "__notes__", [])]).strip()
    for pattern, words in _IN_COMMANDS:
        text = re.sub(pattern, words, text)
    if type(error).__module__.startswith("gift.") or (type(error) in _PLAIN and text):
        return text
    return f"{type(error).__name__}: {text}\n({TRACEBACK}=1 shows where this comes from)"


def complain(text: str) -> None:
    """Print to standard error; with several processes, each prints its rank."""
    typer.echo(f"[process {rank()}] {text}" if "RANK" in os.environ else text, err=True)


def say(text: str) -> None:
    """Print; with several processes, only the first one prints."""
    if rank() == 0:
        typer.echo(text)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Context manager that shows gift's own warnings as one line, in the first process only."""
    before = warnings.showwarning

    def show(text: Any, category: Any, *place: Any, **more: Any) -> None:
        if not issubclass(category, GiftWarning):
            before(text, category, *place, **more)
        elif rank() == 0:
            print(f"warning: {text}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]  # it takes what that takes
    try:
        yield
    finally:
        warnings.showwarning = before
