"""The strategies of the registered methods: `LoRAAllFineTuningStrategy` and so on.

They are generated from the methods. ``of_methods.pyi`` declares them for editors and type checkers.
"""

from gift.strategies.adapting import STRATEGIES, lookup_for

__all__ = list(STRATEGIES)

__getattr__ = lookup_for(__name__)  # pickle looks here for the classes
