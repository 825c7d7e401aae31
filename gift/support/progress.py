"""Progress bars, where somebody watches: in a terminal or a notebook, not in redirected output."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, TypeVar

from gift.support.contexts import holding

T = TypeVar("T")

DELAY = 2.0
"""Seconds after which `slow` shows a bar."""

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


def hidden(hide: bool = True) -> AbstractContextManager[None]:
    """Context that shows no bars; nothing changes unless `hide`."""
    return holding(_hidden, _hidden.get() or hide)


def is_watched() -> bool:
    """Whether standard error is a terminal, or the code runs in a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether the code runs in a kernel of Jupyter."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def bar(items: Iterable[Any] | None, name: str, **options: Any) -> Any:
    """Wrap an iterable in a progress bar of tqdm, which must be installed.

    Args:
        items: the iterable.
        name: text in front of the bar.
        options: further keyword arguments of tqdm.
    """
    options = {"leave": False, "disable": _hidden.get() or not is_watched()} | options
    fits = in_notebook() and find_spec("ipywidgets") is not None
    tqdm: Any = importlib.import_module("tqdm.notebook" if fits else "tqdm").tqdm
    return tqdm(items, name, **options)


def slow(items: Iterable[T], name: str, total: int | None = None) -> Iterable[T]:
    """Return an iterable that shows a bar if going through it takes more than two seconds.

    Args:
        items: the iterable.
        name: what is done with the items.
        total: number of items, if the iterable has no length.
    """
    if _hidden.get() or not is_watched() or find_spec("tqdm") is None:
        return items
    wrapped: Iterable[T] = bar(items, name, total=total, delay=DELAY)
    return wrapped


@contextmanager
def counting(name: str, total: int) -> Iterator[Callable[[], object]]:
    """Context with a function to call for each of `total` parts of work, which `slow` cannot wrap.

    Args:
        name: what is done.
        total: number of parts.
    """
    if _hidden.get() or not is_watched() or find_spec("tqdm") is None:
        yield lambda: None
        return
    with bar(None, name, total=total, delay=DELAY) as shown:
        yield lambda: shown.update()


def write(text: str) -> None:
    """Print a line without disturbing the bars."""
    if find_spec("tqdm") is None or in_notebook():
        print(text, flush=True)
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
