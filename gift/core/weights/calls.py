"""Calls of networks, within which an effective weight is made once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from gift.core.weights.graph import Again
    from gift.core.weights.reading import Memory


@dataclass(eq=False)
class Entry:
    """A cached effective weight within one call.

    Args:
        tensors: its inputs. Holding them here keeps their ids valid.
        graph: its node in the graph; None without gradients.
        again: computes it in backward passes.
        memory: a weak reference to its values.
        value: a strong reference to its values, while the module that reads it runs.
    """

    tensors: tuple[Tensor, ...]
    graph: Tensor | None
    again: "Again"
    memory: "Memory"
    value: Tensor | None = None


class Calls(threading.local):
    """The running calls of a thread.

    Attributes:
        entries: the cached weights of the outermost call, by their inputs; None outside of a call.
        kept_bytes: size of the cached values that are kept until it ends.
        begun: number of outermost calls so far.
        running: the modules that may read a weight often, each with the entries that it has read.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Any, ...], Entry] | None = None
        self.kept_bytes = self.begun = 0
        self.running: list[tuple[nn.Module, list[Entry]]] = []


CALLS = Calls()


@contextmanager
def one_call(module: nn.Module, reads_often: bool) -> Iterator[None]:
    """Context in which each effective weight is computed once.

    Args:
        module: the module that is called.
        reads_often: keep the weights of this module alive until it has run.
    """
    calls = CALLS
    is_outermost = calls.entries is None
    if is_outermost:
        calls.entries, calls.kept_bytes = {}, 0
        calls.begun += 1
    if reads_often:
        calls.running.append((module, []))
    try:
        yield
    finally:
        if reads_often:
            for entry in calls.running.pop()[1]:
                entry.value = None
        if is_outermost:
            calls.entries = None


def calls_so_far() -> int | None:
    """How many calls of networks this thread has begun; None inside a call."""
    return CALLS.begun if CALLS.entries is None else None
