"""Recipes: how strategies, checks and actions record their construction, so files can name them.

A recipe is the name of a registered class or function and the arguments of the call. A file can
name only what is registered here, with plain values, so loading a file runs no foreign code.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from gift.errors import closest
from gift.support.tensors import dtype_name

REGISTRY: dict[str, Callable[..., Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register(maker: F) -> F:
    """Decorator that lets files name a strategy, check or action by its ``__name__``.

    Raises:
        ValueError: if the name belongs to another one.
    """
    known = REGISTRY.get(maker.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (
        maker.__module__,
        maker.__qualname__,
    ):
        raise ValueError(f"the name {maker.__name__!r} is taken by {known.__module__}")
    REGISTRY[maker.__name__] = maker
    return maker


def registered(base: type) -> dict[str, Any]:
    """The registered subclasses of `base`, by name."""
    classes = {name: made for name, made in REGISTRY.items() if isinstance(made, type)}
    return {name: classes[name] for name in sorted(classes) if issubclass(classes[name], base)}


def bound_arguments(maker: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, defaults included; containers are copied.

    Raises:
        TypeError: if the arguments do not fit, naming `maker` and the closest keywords.
    """
    signature = inspect.signature(maker)
    bound = _bind(maker, args, kwargs)
    bound.apply_defaults()
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat["*"] = own_copy(list(value))
        else:
            flat[name] = own_copy(value)
    return flat


def _bind(maker: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    signature = inspect.signature(maker)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        known, name = list(signature.parameters), maker.__name__
        unknown = [f"{n!r}, closest: {closest(n, known)}" for n in kwargs if n not in known]
        if unknown:
            wrong = f"{name} has no setting {'; '.join(unknown)}; it has {known}"
            raise TypeError(wrong) from None
        raise TypeError(f"{name}: {error}") from None


def own_copy(value: Any) -> Any:
    """`value` with copies of the lists, tuples and dictionaries in it."""
    if type(value) in (list, tuple):
        return [own_copy(item) for item in value]
    if type(value) is dict:
        return {key: own_copy(item) for key, item in value.items()}
    return value


DEEPEST = 100
"""Maximum nesting of strategies, lists and mappings; each strategy counts as two levels."""


def encode(value: Any, where: str = "", depth: int = 0) -> Any:
    """Convert a value to plain data.

    Args:
        value: the value.
        where: where the value stands, for errors.
        depth: how many levels are around it.

    Raises:
        ValueError: for what a file cannot hold, such as a lambda, or what is nested too deeply.
    """
    if depth > DEEPEST:
        raise ValueError(f"the strategy is nested deeper than {DEEPEST} levels")
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    name, init_paras = getattr(value, "recipe", (None, None))
    if name is None or name not in REGISTRY:
        raise ValueError(
            f"{where or 'the strategy'} is {value!r}, which a file cannot name: use plain values, "
            "the checks and actions of gift.factories, and strategies decorated with "
            "gift.strategies.register_strategy"
        )
    return {"name": name, "init_paras": encode(init_paras, name, depth)}


def decode(data: Any, depth: int = 0) -> Any:
    """Convert the plain data of `encode` back to a value.

    Args:
        data: plain data.
        depth: how many levels are around it.

    Raises:
        ValueError: for names that are not registered, arguments that do not fit, or data that are
            nested too deeply.
    """
    if depth > DEEPEST:
        raise ValueError(f"this is nested deeper than {DEEPEST} levels")
    if isinstance(data, list):
        return [decode(item, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    if set(data) != {"name", "init_paras"}:
        return {key: decode(item, depth + 1) for key, item in data.items()}
    name, init_paras = data["name"], data["init_paras"]
    if not isinstance(name, str) or name not in REGISTRY:
        close = closest(name, REGISTRY)
        raise ValueError(
            f"{name!r} is not registered, closest: {close}; a file can name these: "
            f"{sorted(REGISTRY)}"
        )
    if not isinstance(init_paras, dict):
        raise ValueError(f"init_paras of {name} is {init_paras!r}, expected a mapping")
    keywords = {str(key): decode(item, depth + 1) for key, item in init_paras.items()}
    positional = keywords.pop("*", [])
    keywords = getattr(REGISTRY[name], "of_file", dict)(keywords)
    try:
        _bind(REGISTRY[name], positional, keywords)
    except TypeError as error:
        raise ValueError(f"init_paras of {name} do not fit: {error}") from error
    return REGISTRY[name](*positional, **keywords)
