"""Temporary states of modules, set by a ``with`` block: "merged", "disabled"."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

# Keyed by identity: a copy of a module is not in the state.
_now: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def meanwhile(modules: Iterable[nn.Module], state: str) -> Iterator[None]:
    """Context in which the modules are in a state, named by one word such as "merged"."""
    before = {module: _now.get(module) for module in modules}
    _now.update(dict.fromkeys(before, state))
    try:
        yield
    finally:
        for module, other in before.items():
            if other is None:
                _now.pop(module)
            else:
                _now[module] = other


def modules_meanwhile() -> tuple[nn.Module, ...]:
    """All modules that are in a temporary state now."""
    return tuple(m for known in _now.keyrefs() if (m := known()) is not None)


def refuse_meanwhile(module: nn.Module, *states: str, itself: bool = True) -> None:
    """Refuse an operation on a network that is in one of these states; any state if none is named.

    Args:
        module: the network.
        states: the states.
        itself: whether the module counts, or only modules inside.

    Raises:
        RuntimeError: if `module`, or a module inside, is in one of the states now.
    """
    for path, part in module.named_modules() if _now else ():
        state = _now.get(part) if itself or path else None
        if state is not None and (not states or state in states):
            name = path or f"this {type(part).__name__}"
            raise RuntimeError(f"{name} is temporarily {state}: do this after the with block")
