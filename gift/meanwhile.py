"""Modules of which a ``with`` block makes something else for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

# By identity: a copy is a module of its own.
_now: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def meanwhile(modules: Iterable[nn.Module], state: str) -> Iterator[None]:
    """Within it, the modules are in that state, in a word: "merged", say."""
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
    """All modules that are in such a state now."""
    return tuple(m for known in _now.keyrefs() if (m := known()) is not None)


def refuse_meanwhile(module: nn.Module, *states: str, itself: bool = True) -> None:
    """Refuse what cannot be done to a network in these states; all if none is named.

    Args:
        module: the network.
        states: the states.
        itself: whether the module counts, or parts of it alone.

    Raises:
        RuntimeError: if `module`, or a part of it, is in one now.
    """
    for path, part in module.named_modules() if _now else ():
        state = _now.get(part) if itself or path else None
        if state is not None and (not states or state in states):
            name = path or f"this {type(part).__name__}"
            raise RuntimeError(f"{name} is {state} for a while: do this after the with block")
