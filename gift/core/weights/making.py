"""How an effective weight is made from a frozen tensor and the tensors of a delta."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gift.core.weights.graph import product_parts
from gift.layers.layouts import Layout


@dataclass(frozen=True, eq=False)
class WeightMaking:
    """A `Making` of an effective weight from the frozen one and the tensors of a delta.

    Args:
        layout: how the weight is read as a matrix.
        method: the method that changes the matrix.
        keys: the method's names of the tensors.
        of_bias: whether the tensor is a bias.
    """

    layout: Layout
    method: Any
    keys: tuple[str, ...]
    of_bias: bool = False

    def working_dtype(self, frozen: Tensor) -> torch.dtype:
        """The dtype for computing, exact for the weight and the delta."""
        dtype: torch.dtype = self.method.working_dtype(frozen)
        return dtype

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The effective weight in the frozen one's dtype."""
        frozen, parameters = self._precise(tensors)
        dtype = self.method.working_dtype(frozen)
        matrix = self.layout.to_matrix(frozen).to(dtype)
        make = self.method.effective_bias if self.of_bias else self.method.effective_weight
        return self.layout.to_weight(make(matrix, parameters)).to(frozen.dtype)

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Gradients of the frozen tensor and the factors of a low-rank delta; None for others."""
        if self.of_bias or not self.method.low_rank_is_cheap:
            return None
        factors = self.method.scaled_low_rank(self._precise(tensors)[1])
        if factors is None:
            return None
        left, right, scale = factors
        matrix = self.layout.to_matrix(g)
        return [(tensors[0], g), *product_parts(left, right, matrix, scale, differentiable)]

    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The factors of a low-rank delta; None for others."""
        if not self.method.low_rank_is_cheap:
            return None
        factors: tuple[Tensor, Tensor] | None = self.method.low_rank(self._precise(tensors)[1])
        return factors

    def _precise(self, tensors: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The frozen tensor, and the others in the dtype for computing."""
        frozen, *others = tensors
        dtype = self.method.working_dtype(frozen)
        named = zip(self.keys, others, strict=True)
        return frozen, {key: in_precision_of(value, dtype) for key, value in named}


_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def in_precision_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to the precision of `dtype`; real tensors stay real, and indices stay as they are."""
    if value.is_floating_point():
        return value.to(_REAL.get(dtype, dtype))
    return value.to(dtype) if value.is_complex() else value
