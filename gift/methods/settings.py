"""Settings of methods: dataclass fields that say what they may be.

`Method` checks each of its fields, all at once, when one is made.
"""

import math
from collections.abc import Callable
from dataclasses import Field, field
from typing import Any

import torch


def setting(
    default: Any,
    expected: str,
    check: Callable[[Any], bool],
    enters_weight: bool = True,
    kw_only: bool = False,
) -> Any:
    """A field of a method; None is allowed where it is the default.

    Args:
        default: its value if none is given.
        expected: what it may be, in words.
        check: whether a value is that.
        enters_weight: whether a saved delta means another weight under another value.
        kw_only: whether it is given by keyword alone.
    """
    metadata = {"expected": expected, "check": check, "enters_weight": enters_weight}
    return field(default=default, metadata=metadata, kw_only=kw_only)


def whole(default: int | None, least: int = 1, **options: Any) -> Any:
    """An integer of at least `least`."""

    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return setting(default, f"an integer of at least {least}", check, **options)


def number(default: float | None, **options: Any) -> Any:
    """A finite number."""
    return setting(default, "a finite number", _is_number, **options)


def probability(default: float = 0.0) -> Any:
    """A probability below one, of something that happens in training alone."""

    def check(value: Any) -> bool:
        return _is_number(value) and 0 <= value < 1

    return setting(default, "a number in [0, 1)", check, enters_weight=False)


def flag(default: bool = False, **options: Any) -> Any:
    """True or False."""
    return setting(default, "True or False", lambda value: isinstance(value, bool), **options)


def choice(default: str, *others: str, **options: Any) -> Any:
    """One of some words."""
    words = (default, *others)
    expected = " or ".join(repr(word) for word in words)
    return setting(default, expected, lambda value: value in words, **options)


def floating_dtype() -> Any:
    """A floating-point or complex torch dtype, or its name."""

    def check(value: Any) -> bool:
        dtype = dtype_of(value)
        return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)

    return setting(None, "a floating-point torch dtype", check, enters_weight=False, kw_only=True)


def dtype_of(given: torch.dtype | str | None) -> Any:
    """The dtype of that name; what is none stays as it is."""
    return getattr(torch, given, given) if isinstance(given, str) else given


def misfit(field: Field[Any], value: Any) -> str | None:
    """What is wrong with the value of a field, if anything."""
    check = field.metadata.get("check")
    if check is None or (value is None and field.default is None) or check(value):
        return None
    others = " or None" if field.default is None else ""
    return f"{field.name} is {value!r}, expected {field.metadata['expected']}{others}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
