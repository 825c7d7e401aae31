"""What the methods in kohya files have in common: `KohyaMethod`, and the `ReadDelta` they give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gift.interop.kohya.layers import Target

Parts = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ReadDelta:
    """A delta in gift's terms.

    Args:
        method: name of the method.
        settings: settings of the method and the layout.
        values: values of the parameters, by the method's names.
        bias: change of the layer's bias, which is then trained in place.
        weight_only: whether the method must not act on the layer's bias.
    """

    method: str
    settings: dict[str, Any]
    values: dict[str, Tensor]
    bias: Tensor | None = None
    weight_only: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for all layers that can share one cap."""
        trained = self.bias is not None
        return self.method, self.weight_only, trained, *sorted(self.settings.items())


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove kernel axes of length one: a linear layer may be stored as a convolution."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


@dataclass(frozen=True)
class KohyaMethod:
    """A method in kohya files: its tensors, their shapes, and how they are read.

    Args:
        title: name of the method.
        marks: tensors that identify the method.
        choices: sets of tensors, one of which must be present.
        optional: tensors that may be present.
        dims: tensors that show the rank to which alpha is relative, and the axis.
        shapes: returns the expected shapes of all tensors, from the layer and some of the tensors.
        read: converts tensors of these shapes and the scaling to a delta.
    """

    title: str
    marks: set[str]
    choices: list[set[str]]
    optional: set[str]
    dims: list[tuple[str, int]]
    shapes: Callable[[Parts, Target], Shapes]
    read: Callable[[Parts, float, Target], ReadDelta]

    @property
    def names(self) -> set[str]:
        """The names of all its tensors."""
        return self.optional.union(*self.choices)
