"""What is known of classes, for as long as these are there."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")


def known_by_class(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: ask a function once for each class, which is not kept alive by that.

    What it gives must not refer to the class. Further arguments are positional and hashable.
    """
    known: WeakKeyDictionary[type, dict[tuple[Any, ...], T]] = WeakKeyDictionary()

    @wraps(function)
    def asked_once(cls: type, *args: Any) -> T:
        if torch.compiler.is_compiling():  # compilers cannot look into weak references
            return function(cls, *args)
        own = known.get(cls)
        if own is None:
            own = known[cls] = {}
        if args not in own:
            own[args] = function(cls, *args)
        return own[args]

    return asked_once
