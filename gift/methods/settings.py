"""Settings of methods: dataclass fields that declare their valid values.

`Configured` checks all of its fields at once when an instance is made.
"""

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.kernels.cost_model import FORMS
from gift.support.tensors import dtype_name


def setting(
    default: Any,
    expected: str,
    check: Callable[[Any], bool],
    enters_weight: bool = True,
    kw_only: bool = False,
    found: bool = False,
) -> Any:
    """Declare a setting; None is a valid value if it is the default.

    Args:
        default: the default value.
        expected: description of the valid values.
        check: function that returns whether a value is valid.
        enters_weight: whether the effective weight of a saved delta depends on the value.
        kw_only: whether the setting is keyword-only.
        found: whether `fit` determines the value if it is not given, so that it does not represent
            a user's choice.
    """
    metadata = {
        "expected": expected,
        "check": check,
        "enters_weight": enters_weight,
        "found": found,
    }
    return field(default=default, metadata=metadata, kw_only=kw_only)


def whole(default: int | None, least: int = 1, **options: Any) -> Any:
    """Declare a setting: an integer of at least `least`."""

    def check(value: Any) -> bool:
        return is_integer(value) and value >= least

    return setting(default, f"an integer of at least {least}", check, **options)


def number(default: float | None, **options: Any) -> Any:
    """Declare a setting: a finite number."""
    return setting(default, "a finite number", is_number, **options)


def positive(default: float | None, **options: Any) -> Any:
    """Declare a setting: a finite number above zero."""

    def check(value: Any) -> bool:
        return is_number(value) and value > 0

    return setting(default, "a finite number above zero", check, **options)


def probability(default: float = 0.0, kw_only: bool = False) -> Any:
    """Declare a setting: a probability below one, which only matters in training."""

    def check(value: Any) -> bool:
        return is_number(value) and 0 <= value < 1

    return setting(default, "a number in [0, 1)", check, enters_weight=False, kw_only=kw_only)


def flag(default: bool | None = False, **options: Any) -> Any:
    """Declare a setting: True or False."""
    return setting(default, "True or False", lambda value: isinstance(value, bool), **options)


def choice(default: str | None, *others: str, **options: Any) -> Any:
    """Declare a setting: one of several words."""
    words = [word for word in (default, *others) if word is not None]
    expected = " or ".join(repr(word) for word in words)
    return setting(default, expected, lambda value: value in words, **options)


def form_of_computing() -> Any:
    """Declare a setting: how fast paths compute."""
    return choice(None, *FORMS, enters_weight=False, kw_only=True)


def floating_dtype() -> Any:
    """Declare a setting: a floating-point or complex dtype of at least 16 bits, or its name."""

    def check(value: Any) -> bool:
        dtype = dtype_of(value)
        if not isinstance(dtype, torch.dtype) or dtype.itemsize < 2:  # has no random numbers
            return False
        return dtype.is_floating_point or dtype.is_complex

    return setting(
        None,
        "a floating-point torch dtype of at least 16 bits",
        check,
        enters_weight=False,
        kw_only=True,
    )


def dtype_of(given: torch.dtype | str | None) -> Any:
    """Return the dtype of that name; anything that is not a dtype's name is returned unchanged."""
    return getattr(torch, given, given) if isinstance(given, str) else given


def why_invalid(field: Field[Any], value: object) -> str | None:
    """Return why the value of a field is invalid, or None."""
    check = field.metadata.get("check")
    if check is None or (value is None and field.default is None) or check(value):
        return None
    others = " or None" if field.default is None else ""
    return f"{field.name} is {value!r}, expected {field.metadata['expected']}{others}"


def is_integer(value: object) -> bool:
    """Whether the value is an integer; True is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether the value is a finite number; True is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Configured:
    """Base class of methods with settings, whether they adapt weights or wrap forwards.

    Args:
        dtype: dtype of the new parameters, or its name; None means that of the adapted weight, but
            at least float32.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
    """

    name: ClassVar[str]

    size_setting: ClassVar[str | None] = None
    """The integer setting that determines the number of added parameters."""

    shares_names: ClassVar[bool] = False
    """Whether another method gives its parameters the same names.

    Then only the settings of a saved delta distinguish the two.
    """

    dtype: torch.dtype | str | None = floating_dtype()  # noqa: RUF009 - gives a field

    def __post_init__(self) -> None:
        problems = [why_invalid(field, getattr(self, field.name)) for field in fields(self)]
        found = "; ".join(problem for problem in problems if problem is not None)
        if found:
            raise ValueError(f"{type(self).__name__}: {found}")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values, as a file stores them with a delta."""
        plain = (bool, int, float, str, type(None))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v if isinstance(v, plain) else dtype_name(v) for k, v in values.items()}

    @property
    def compat_settings(self) -> dict[str, Any]:
        """The settings that a saved delta and a network must agree on, as they enter the result."""
        entering = {f.name for f in fields(self) if f.metadata.get("enters_weight", True)}
        return {name: value for name, value in self.settings.items() if name in entering}

    @property
    def hidden_settings(self) -> dict[str, Any]:
        """The non-default part of `compat_settings` that parameter names and shapes do not show."""
        if self.shares_names:
            return dict(self.compat_settings)
        shown = {self.size_setting, *(f.name for f in fields(self) if f.metadata.get("found"))}
        entering = [f for f in fields(self) if f.metadata.get("enters_weight", True)]
        if all(f.name in shown or getattr(self, f.name) == f.default for f in entering):
            return {}
        size = {k: v for k, v in self.settings.items() if k == self.size_setting}
        default = type(self)(**size).compat_settings
        return {
            name: value
            for name, value in self.compat_settings.items()
            if name not in shown and default.get(name) != value
        }

    def __str__(self) -> str:
        chosen = [field for field in fields(self) if not field.metadata.get("found")]
        values = [(field, getattr(self, field.name)) for field in chosen]
        shown = [f"{field.name}={value}" for field, value in values if value != field.default]
        return f"{self.name}({', '.join(shown)})"

    def delta_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of new parameters: `dtype`, or else the weight's, at least 32 bits."""
        return at_least_32_bits(weight.dtype) if self.dtype is None else dtype_of(self.dtype)

    def factory_kwargs(self, weight: Tensor) -> dict[str, Any]:
        """Return dtype and device of new parameters for that weight, as keyword arguments."""
        return {"dtype": self.delta_dtype(weight), "device": weight.device}


def at_least_32_bits(dtype: torch.dtype) -> torch.dtype:
    """Promote a dtype of fewer than 32 bits to 32 bits."""
    if dtype.itemsize == 1:  # float8 does not support type promotion
        return torch.float32
    return torch.promote_types(dtype, torch.float32)
