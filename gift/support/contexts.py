"""Values that hold for the code in a context, and for the functions that it calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Context in which a context variable has that value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
