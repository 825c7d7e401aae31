"""Errors in jobs, for readers who wrote a file and never saw the code that reads it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gift.errors import closest

Path = tuple[str | int, ...]


def hint(name: Any, known: Iterable[str]) -> str:
    """Return similar names, or all known names if there are none, for an error on an unknown name.

    Example:
        >>> hint("epoch", ["epochs", "lr"]), hint("x", ["epochs", "lr"])
        ("closest: 'epochs'", 'there are: epochs, lr')
    """
    known = list(known)
    if near := closest(name, known):
        return "closest: " + ", ".join(map(repr, near))
    return "there are: " + (", ".join(known) or "none")


def dotted(path: Path) -> str:
    """Format a place in a file: ``data.train[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "a text",
    "tuple": "a list",
    "list": "a list",
    "dict": "settings, a line 'name: value' for each",
    "model": "settings, a line 'name: value' for each",
    "dataclass": "settings, a line 'name: value' for each",
}


def in_words(error: Mapping[str, Any], names_at: Callable[[Path], Sequence[str]]) -> str:
    """Format a pydantic error as a sentence.

    Args:
        error: one of `pydantic.ValidationError.errors`.
        names_at: returns the valid names at a place.
    """
    path, kind, value = error["loc"], error["type"], error["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no such setting, {hint(path[-1], names_at(path[:-1]))}"
    if kind == "missing":
        return "this is missing"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "invalid_key" or path[-1:] == ("[key]",):
        return f"the name {shown(path[-2] if path[-1] == '[key]' else path[-1])} is not a text"
    if kind == "literal_error":
        return f"this is {shown(value)}, expected {error['ctx']['expected']}"
    expected = _EXPECTED.get(kind) or _EXPECTED.get(kind.split("_")[0])
    if expected is None:
        expected = error["msg"].removeprefix("Input should be ")
    return f"this is {shown(value)}, expected {expected}"


def shown(value: Any) -> str:
    """Format a value as in a YAML file, shortened if it is long."""
    if value is None or isinstance(value, bool):
        return "empty (null)" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
