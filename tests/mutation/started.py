"""What the lane does in the processes that tests start: they break what is broken, and are watched.

`reach` has Python load `processes/sitecustomize.py` in each of them.
"""

import os
import sys
import threading
from pathlib import Path
from types import CodeType
from typing import Any

from tests.mutation.broken import NAME, ROOT, break_module

CALLS = "GIFT_CALLS"  # the file to which processes append the functions that they call


def reach() -> None:
    paths = [str(Path(__file__).parent / "processes"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def begin() -> None:
    """Do what the process that runs the test asks for in its environment."""
    if NAME in os.environ:
        module, _, number = os.environ[NAME].rpartition(": ")
        break_module(module, int(number))
    if CALLS in os.environ:
        note_calls(Path(os.environ[CALLS]))


def name_of(code: CodeType) -> str | None:
    """Return "path: qualified name" of a function of gift, None for others."""
    path = code.co_filename.removeprefix(f"{ROOT}/")
    return f"{path}: {code.co_qualname}" if path.startswith("gift/") else None


def note_calls(path: Path) -> None:
    """Append each function to the file at its first call: a process that is killed tells, too."""
    seen: set[CodeType] = set()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def call(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code not in seen:
            seen.add(frame.f_code)
            if (name := name_of(frame.f_code)) is not None:
                os.write(file, f"{name}\n".encode())

    threading.settrace(call)  # type: ignore[arg-type]  # as in its documentation
    sys.settrace(call)
