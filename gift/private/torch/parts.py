"""Look up a private part of torch by its dotted path.

A part is looked up on each use. It is looked up once, at import, if a compiler traces the use or if
each training step would pay for it.
"""

import contextlib
import sys
from typing import Any


def part(path: str) -> Any:
    """The object at the dotted path of a part, or None if it is gone."""
    root, *names = path.split(".")
    found: Any = sys.modules.get(root)
    for i, name in enumerate(names):
        inner = getattr(found, name, None)
        if inner is None:
            module = ".".join((root, *names[: i + 1]))
            with contextlib.suppress(ImportError):
                inner = __import__(module, fromlist=["_"])
        if inner is None:
            return None
        found = inner
    return found
