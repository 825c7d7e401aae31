"""Base class of checks and actions, which record how they were made."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Self, TypeVar

from gift.support.recipes import REGISTRY, bound_arguments, register

P = ParamSpec("P")
R = TypeVar("R", bound="Recorded")


_SHOWN = 5  # items of a list of names, which may be as long as a network


class Recorded:
    """An object with a recipe: the registered function that made it, and its arguments."""

    recipe: tuple[str, dict[str, Any]] = ("", {})

    def like(self, other: R) -> R:
        """Return `other` with this object's recipe."""
        other.recipe = self.recipe
        return other

    def bind(self, network: Any) -> Self:
        """Return the object for that network; most objects do not depend on it."""
        return self

    def __reduce__(self) -> Any:
        # By recipe, since the functions inside are local and cannot be pickled.
        return _made_again, self.recipe

    def __repr__(self) -> str:
        name, arguments = self.recipe
        given = arguments.get("*", [])
        shown = [describe(item) for item in given[:_SHOWN]]
        shown += [f"and {len(given) - _SHOWN} more"] * (len(given) > _SHOWN)
        # None, False and zero are options that nobody set.
        taken = {k: v for k, v in arguments.items() if k != "*" and not _is_off(v)}
        shown += [f"{k}={describe(v)}" for k, v in taken.items()]
        return f"{name}({', '.join(shown)})"


def _made_again(name: str, arguments: dict[str, Any]) -> Any:
    keywords = dict(arguments)
    return REGISTRY[name](*keywords.pop("*", []), **keywords)


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float) and not value)


def recorded(factory: Callable[P, R]) -> Callable[P, R]:
    """Decorator: record the recipe of what the factory returns, and let files name the factory."""

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> R:
        made = factory(*args, **kwargs)
        made.recipe = (factory.__name__, bound_arguments(factory, *args, **kwargs))
        return made

    register(make)
    return make


def bind(part: Callable[..., Any], network: Any) -> Callable[..., Any]:
    """Return the check or action for that network, if it depends on it."""
    bound = getattr(part, "bind", None)
    return part if bound is None else bound(network)


def describe(value: Any) -> str:
    """Return a short text for a check, an action or an argument of these."""
    if isinstance(value, type):
        return value.__name__
    code = getattr(value, "__code__", None)
    if code is not None:
        folder, _, file = code.co_filename.replace("\\", "/").rpartition("/")
        if "/ipykernel_" in folder:  # its file names for cells are meaningless
            return f"{value.__name__} (line {code.co_firstlineno} of a cell)"
        return f"{value.__name__} ({file}:{code.co_firstlineno})"
    return repr(value)
