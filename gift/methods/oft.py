"""OFT: rotations of blocks of input features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.kernels.linear import Product, linear_forwards
from gift.methods.base import Method, register_method
from gift.methods.settings import flag, whole


@register_method
@dataclass(frozen=True)
class OFT(Method):
    r"""Orthogonal fine-tuning (Qiu et al. 2023, https://arxiv.org/abs/2306.07280).

    .. math:: W' = W_0 R^T, \quad R = \operatorname{diag}(R_1, \dots, R_n), \quad
        R_i = (I + Q_i)(I - Q_i)^{-1}, \quad Q_i = -Q_i^T

    Each block of `b` inputs is rotated in the same way for all outputs, which preserves the norms
    of neurons and the angles between them. For a matrix ``(rows, columns)`` it adds ``oft_Q (n, b
    (b-1) / 2)`` with ``n = columns / b``: the upper triangles of the skew-symmetric blocks, row by
    row, starting at zero. That is ``columns * (b-1) / 2`` parameters. For a complex weight `Q` is
    skew-Hermitian with a zero diagonal, and `R` unitary.

    The effective weight is computed as :math:`W_0 + W_0 (R^T - I)` with :math:`R^T - I = -2 (I +
    Q)^{-1} Q`, exactly zero at the start. A linear layer rotates its input instead, which is cheap
    and makes neither a weight nor a gradient of its size. PEFT has the same sign of `Q` in its
    default, a series, and the opposite sign where it computes exactly and in embeddings.

    Args:
        block_size: `b`, which must divide the columns. None means the divisor nearest to 32.
        block_share: whether all blocks share one rotation, with ``b (b-1) / 2`` parameters.
        clip_block_size: whether a matrix whose columns `block_size` does not divide gets the
            nearest divisor. None means yes, with a warning that names the matrix, unless it divides
            the columns of no matrix, which is an error. False makes every such matrix an error.
            True clips without a warning.
        dtype: dtype of `Q`, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "oft"
    strategy_prefix: ClassVar[str] = "OFT"
    conv_layouts = ("out_as_h",)
    size_setting: ClassVar[str] = "block_size"
    default_block_size: ClassVar[int] = 32

    block_size: int | None = whole(None, least=2)
    block_share: bool = flag()
    clip_block_size: bool | None = flag(None, enters_weight=False, kw_only=True)

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its block size settled for a matrix ``(..., rows, columns)``."""
        columns = shape[-1]
        if columns == 1:
            raise AdaptationError(
                "a matrix of one column has nothing to rotate: a rotation needs two inputs"
            )
        small = [n for n in range(1, math.isqrt(columns) + 1) if columns % n == 0]
        sizes = sorted({*small, *(columns // n for n in small)} - {1})
        wanted = self.block_size or self.default_block_size
        nearest = min(sizes, key=lambda size: (abs(size - wanted), size))
        near = [*[n for n in sizes if n < wanted][-1:], *[n for n in sizes if n > wanted][:1]]
        return self.settled(
            nearest,
            f"block_size {wanted} does not divide the {columns} columns of its matrix "
            f"({' or '.join(map(str, near))} would, or clip_block_size=True)",
        )

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``Q``, so that each rotation is the identity."""
        *groups, _, columns = matrix.shape
        assert self.block_size is not None
        blocks = 1 if self.block_share else columns // self.block_size
        above = self.block_size * (self.block_size - 1) // 2
        return {"oft_Q": torch.zeros(*groups, blocks, above, **self.factory_kwargs(matrix))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + W0 (R^T - I)``."""
        return matrix + self.times(matrix, self.change(parameters))

    def change(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``R^T - I`` for each block, ``(..., blocks, b, b)``, in float32 or better."""
        q = parameters["oft_Q"]
        q = q.to(torch.promote_types(q.dtype, torch.float32))  # no half-precision solver
        size = self.block_size
        assert size is not None
        row, column = torch.triu_indices(size, size, 1, device=q.device)
        above = q.new_zeros(*q.shape[:-1], size * size).index_add(-1, row * size + column, q)
        above = above.unflatten(-1, (size, size))
        skew = above - above.mH
        one = torch.eye(size, dtype=q.dtype, device=q.device)
        # I + Q is always invertible: a check would only make a GPU synchronise.
        turned: Tensor = torch.linalg.solve_ex(one + skew, -2 * skew)[0]
        return turned

    def times(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Multiply rows ``(..., rows, columns)`` by a matrix with these blocks on its diagonal."""
        parts = rows.unflatten(-1, (-1, blocks.shape[-1]))
        return torch.einsum("...rni,...nij->...rnj", parts, blocks).flatten(-2)


def _rotated(
    method: OFT,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 (R^T x) + bias``."""
    blocks = method.change(parameters).mT
    change = method.times(x.reshape(-1, x.shape[-1]).to(blocks.dtype), blocks)
    return product.output((x + change.view(x.shape)).to(x.dtype), bias)


OFT.forwards = linear_forwards(_rotated)
