"""The layers for which kohya files can hold a delta."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.layers.table import row_of


class Incompatible(ValueError):
    """A delta cannot be converted between a kohya file and gift; the error has all reasons."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Target:
    """The layer that a delta is for.

    Args:
        module: a linear layer or a convolution.
        weight: its frozen weight, ``(outputs, inputs / groups, *kernel)``.
    """

    module: Any
    weight: Tensor

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear layer."""
        return getattr(self.module, "groups", 1)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size of a convolution; empty for a linear layer."""
        return tuple(self.weight.shape[2:])

    @property
    def columns(self) -> int:
        """The columns of the matrix: inputs times kernel."""
        return self.weight[0].numel()


def is_layer(module: nn.Module) -> bool:
    """Whether kohya files can hold a delta for a module: a linear layer or a convolution."""
    row = row_of(plain_class(type(module)))
    return row is not None and row.family in ("linear", "conv") and row.outputs_first


def flat(path: str) -> str:
    """Return a path in the form of keys."""
    return path.replace(".", "_")
