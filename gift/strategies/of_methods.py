"""The strategies of the registered methods: `LoRAAllFineTuningStrategy` and so on.

They are generated from the methods. ``of_methods.pyi`` declares them for editors and type checkers.
"""

from typing import Any

from gift.strategies.adapting import STRATEGIES

__all__ = list(STRATEGIES)


def __getattr__(name: str) -> Any:
    # Also where pickle looks for a class, and for methods that are registered later.
    if name not in STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return STRATEGIES[name]
