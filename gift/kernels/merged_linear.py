"""The effective weight of a linear layer, for deltas of a rank too high to compute beside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gift.kernels.cost_model import GEMM, MERGE, TOUCH
from gift.kernels.effective_linear import effective_product, made_for
from gift.kernels.linear import Product


@dataclass(frozen=True)
class Terms:
    """The sizes of a low-rank delta and of its layer's input.

    Args:
        rows, columns: shape of the weight.
        rank: rank of the delta.
        positions: number of positions for which the layer computes.
    """

    rows: int
    columns: int
    rank: int
    positions: int

    def go_beside(self, trains: bool = True, both: bool = True) -> bool:
        """Whether applying the factors to the activations costs less than the effective weight.

        Args:
            trains: whether there will be a backward pass.
            both: whether both factors are trained, or the left one alone.

        Example:
            The same delta beside a large weight and a small one:

            >>> [Terms(n, n, 256, 1024).go_beside(both=False) for n in (4096, 384)]
            [True, False]
        """
        size, ends = self.rows * self.columns, self.rows + self.columns
        beside = (GEMM * self.rank + TOUCH) * self.positions * ends
        effective = (GEMM * self.rank + MERGE) * size
        if trains:
            beside *= 3 if both else 3 - self.columns / ends
            effective *= 3 if both else 2
            effective += GEMM * size * self.positions
        return beside < effective


def terms(x: Tensor, rows: int, rank: int) -> Terms:
    """Return the sizes for inputs ``(..., columns)``."""
    *batch, columns = x.shape
    return Terms(rows, columns, rank, math.prod(batch))


def through_weight(
    method: Any,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
) -> Tensor:
    """Compute ``W' x + bias`` with the effective weight ``W'``."""
    made = made_for(product.layer, x) if type(product) is Product else None
    if made is not None:
        output = effective_product(x, made, bias, product.ways, product.transposed)
        if output is not None:
            return output
    matrix = product.matrix
    dtype = method.working_dtype(matrix)
    factors = {key: value.to(dtype) for key, value in parameters.items()}
    weight = method.effective_weight(matrix.to(dtype), factors).to(matrix.dtype)
    return product.output_of(weight, x, bias)
