"""OFT: rotations of blocks of input features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.kernels.checkpointed import checkpointed
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.products import times_blocks
from gift.methods.base import register_method
from gift.methods.blocks import BlockMethod, divisors, rotation_change
from gift.methods.settings import flag, whole


@register_method
@dataclass(frozen=True)
class OFT(BlockMethod):
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
            nearest divisor; see `BlockMethod`.
        dtype: dtype of `Q`, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "oft"
    strategy_prefix: ClassVar[str] = "OFT"
    conv_layouts = ("out_as_h",)

    block_size: int | None = whole(None, least=2)
    block_share: bool = flag()

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its block size settled for a matrix ``(..., rows, columns)``."""
        columns = shape[-1]
        if columns == 1:
            raise AdaptationError(
                "a matrix of one column has nothing to rotate: a rotation needs two inputs"
            )
        return self.cut(
            divisors(columns)[1:], f"does not divide the {columns} columns of its matrix"
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
        return matrix + times_blocks(matrix, self.change(parameters))

    def change(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``R^T - I`` for each block, ``(..., blocks, b, b)``, in float32 or better."""
        assert self.block_size is not None
        return rotation_change(parameters["oft_Q"], self.block_size)


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
    rotated = checkpointed(_times, x, [blocks], product.outputs, product.ways)
    return product.output(rotated, bias)


def _times(x: Tensor, blocks: Tensor) -> Tensor:
    """Compute ``R^T x`` from ``(R^T - I)^T``, in the dtype of `x`."""
    change = times_blocks(x.reshape(-1, x.shape[-1]).to(blocks.dtype), blocks)
    return (x + change.view(x.shape)).to(x.dtype)


OFT.forwards = linear_forwards(_rotated)
