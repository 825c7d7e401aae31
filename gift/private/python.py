"""Private parts of Python; see `gift.private`."""

import re
import sys
from types import FrameType
from typing import Any


def frames_of_threads() -> dict[int, FrameType]:
    """The current frame of each thread, by thread id; empty if Python does not provide them.

    No public function gives the stacks of other threads.
    """
    frames = getattr(sys, "_current_frames", None)
    return {} if frames is None else frames()


def parsed_pattern(pattern: str) -> list[tuple[str, Any]] | None:
    """The parts of a regular expression, each with its name and value; None if Python gives none.

    No public function gives the structure of a regular expression.

    Raises:
        re.error, RecursionError, OverflowError: if it is none.
    """
    re.compile(pattern)
    parse = getattr(getattr(re, "_parser", None), "parse", None)
    return None if parse is None else [_named(part) for part in parse(pattern)]


def _named(part: Any) -> Any:
    """The same, with names in the place of Python's constants, in the parts within it too."""
    if type(part).__name__ == "SubPattern":
        return [_named(inner) for inner in part]
    if isinstance(part, tuple | list):
        made = [_named(inner) for inner in part]
        return tuple(made) if isinstance(part, tuple) else made
    if type(part).__name__ != "_NamedIntConstant":
        return part
    return int(part) if str(part) == "MAXREPEAT" else str(part)
