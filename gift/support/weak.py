"""Cache of facts about classes that does not keep the classes alive."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")


def known_by_class(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator that caches the result of a function for each class, without keeping it alive.

    The result must not refer to the class. Further arguments must be positional and hashable.
    """
    known: WeakKeyDictionary[type, dict[tuple[Any, ...], T]] = WeakKeyDictionary()

    @wraps(function)
    def asked_once(cls: type, *args: Any) -> T:
        if torch.compiler.is_compiling():  # compilers cannot trace weak references
            return function(cls, *args)
        own = known.get(cls)
        if own is None:
            own = known[cls] = {}
        if args not in own:
            own[args] = function(cls, *args)
        return own[args]

    return asked_once
