"""Descriptions of arguments from docstrings: the only source of the comments in a job file."""

import inspect
import re
from collections.abc import Callable
from typing import Any

_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def first_sentence(thing: Any) -> str:
    """Return the first sentence of a docstring, without markup, on one line."""
    text = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return _plain(re.split(r"(?<=\.)\s", text)[0])


def described_arguments(thing: Any) -> dict[str, str]:
    """Return the ``Args`` entries of a docstring by name, without markup, each on one line.

    Example:
        >>> def greet(name, loudly):
        ...     '''Greet somebody.
        ...
        ...     Args:
        ...         name: of the one who is
        ...             greeted.
        ...         loudly: whether ``print`` shouts.
        ...     '''
        >>> described_arguments(greet)
        {'name': 'of the one who is greeted.', 'loudly': 'whether print shouts.'}
    """
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = (inspect.getdoc(thing) or "").partition("\nArgs:\n")
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if entry := _ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: _plain(text) for name, text in found.items()}


def parameters_of(maker: Callable[..., Any]) -> dict[str, Any]:
    """Return the named arguments of a function or class, with their defaults.

    Arguments without a default have `inspect.Parameter.empty`.
    """
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(maker).parameters.values()
    return {p.name: p.default for p in parameters if p.kind not in several}


def _plain(text: str) -> str:
    return " ".join(text.replace(":math:", "").replace("`", "").replace("\\", "").split())
