"""The random number generators of a process: seeding, saving and restoring them."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_all(seed: int) -> None:
    """Seed all random number generators of this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def random_state(order: torch.Generator | None) -> dict[str, Any]:
    """Return the states of all random number generators of this process, as plain data.

    Args:
        order: generator that a data loader draws its order from, if it has its own.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    if order is not None:
        state["order"] = order.get_state()
    return state


def restore_random(state: dict[str, Any], order: torch.Generator | None) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(_tuples(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.set_state(state["numpy"])
    if order is not None and "order" in state:
        order.set_state(state["order"])


@contextmanager
def kept_random(order: torch.Generator | None) -> Iterator[None]:
    """Context manager that restores the random states on exit."""
    state = random_state(order)
    try:
        yield
    finally:
        restore_random(state, order)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
