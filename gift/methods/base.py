"""What a method is: a function of a frozen matrix and of a few trained parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

METHODS: dict[str, type["Method"]] = {}


class AdaptationError(ValueError):
    """A tensor cannot be adapted as asked; the message says why and what would work."""


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen matrix ``W`` becomes an effective one.

    A subclass is a frozen dataclass whose fields are its settings. It sees every weight as a
    matrix ``(rows, columns)`` or as a batch ``(groups, rows, columns)``; layers are unknown to it.
    """

    name: ClassVar[str]
    """The name under which the method is chosen: ``ma_adapt(name)``."""

    forwards: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Fast paths, from the dotted name of a stock layer's ``forward`` to one of the same signature.
    Each must agree with the materialised weight in value and gradient."""

    dropout: ClassVar[float] = 0.0
    """Probability for `drop`; a method with such a setting has a property of this name."""

    def fit(self, shape: tuple[int, ...]) -> Self:
        """The method with settings for a matrix of that shape.

        Raises:
            AdaptationError: if no such matrix can be adapted with these settings.
        """
        return self

    def init(self, matrix: Tensor) -> dict[str, Tensor]:
        """New parameters for a frozen matrix, in the order in which they are listed."""
        raise NotImplementedError

    def weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The effective matrix, of the shape and dtype of `matrix`."""
        raise NotImplementedError

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """The parameters with dropout on the input features, for a training step in which the
        layer reads its weight itself; `input_axis` is the matrix axis of the input features.
        """
        return parameters

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values: what a file says of a delta."""
        plain = (bool, int, float, str, type(None))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v if isinstance(v, plain) else str(v) for k, v in values.items()}

    @property
    def meaning(self) -> dict[str, Any]:
        """What a saved delta and a network must agree on: the settings that enter the weight."""
        return self.settings

    def __str__(self) -> str:
        values = [(field, getattr(self, field.name)) for field in fields(self)]
        shown = [f"{field.name}={value}" for field, value in values if value != field.default]
        return f"{self.name}({', '.join(shown)})"

    def delta_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype of new parameters beside `weight`: its own, but at least 32 bits."""
        if weight.dtype.itemsize == 1:  # float8 takes no part in promotion
            return torch.float32
        return torch.promote_types(weight.dtype, torch.float32)


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name."""
    known = METHODS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"method name {cls.name!r} is taken by {known.__qualname__}")
    METHODS[cls.name] = cls
    return cls


def method_of(name: str | Method, settings: Mapping[str, Any]) -> Method:
    """The method of that name with these settings.

    Raises:
        ValueError: for an unknown name or setting.
    """
    if isinstance(name, Method):
        if settings:
            raise ValueError(f"{name!r} has its settings already, got {dict(settings)} as well")
        return name
    if name not in METHODS:
        close = get_close_matches(str(name), METHODS, n=3)
        raise ValueError(f"unknown method {name!r}; known: {sorted(METHODS)}, closest: {close}")
    cls = METHODS[name]
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        fields = list(cls.__dataclass_fields__)
        raise ValueError(f"{name} has no setting {unknown}; it has {fields}")
    return cls(**settings)


def dotted(function: Callable[..., Any]) -> str:
    """The dotted name of a function, as in the keys of `Method.forwards`."""
    return f"{function.__module__}.{function.__qualname__}"
