"""BOFT: rotations that mix all input features, as products of butterfly factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.kernels.checkpointed import checkpointed
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.products import times_blocks
from gift.kernels.rescale import finite, rescaled
from gift.methods.base import register_method, with_settings
from gift.methods.blocks import BlockMethod, divisors, rotation_change
from gift.methods.settings import flag, whole


@register_method
@dataclass(frozen=True)
class BOFT(BlockMethod):
    r"""Orthogonal butterfly fine-tuning (Liu et al. 2024, https://arxiv.org/abs/2311.06243).

    .. math:: W' = \operatorname{diag}(s) \, W_0 R^T, \quad R = F_m \cdots F_1, \quad
        F_i = P_i \operatorname{diag}(R_{i1}, \dots, R_{in}) P_i^T

    Each butterfly factor rotates blocks of `b` inputs, as OFT does. Factor `i` makes a block of two
    half-blocks that lie ``2^(i-1)`` half-blocks apart, so that after `m` factors each input has
    mixed with ``2^(m-1) b`` of them. For a matrix ``(rows, columns)`` it adds
    ``boft_Q (m, n, b (b-1) / 2)`` with ``n = columns / b``, the upper triangles of skew-symmetric
    blocks, which start at zero, and ``boft_s (rows, 1)``, which starts at one. That is ``m columns
    (b-1) / 2 + rows`` parameters. Rotations are those of `OFT` (Cayley), unitary for complex
    weights. One factor is OFT with rescaled outputs.

    The effective weight is computed factor by factor by its difference from the identity, which is
    exactly zero at the start. A linear layer rotates its input instead, and rescales its output.

    Args:
        block_size: `b`. With several factors it must be even, and ``2^(m-1) b`` must divide the
            columns; with one, it must divide the columns. None means the possible size nearest to
            8.
        n_factors: `m`. None means 2, or 1 for a matrix whose columns 4 does not divide.
        rescale: whether to train `s`, a factor for each row. Biases are not rescaled.
        clip_block_size: whether a matrix that cannot have the block size gets the nearest one; see
            `BlockMethod`.
        dtype: dtype of the parameters, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "boft"
    strategy_prefix: ClassVar[str] = "BOFT"
    conv_layouts = ("out_as_h",)
    default_block_size: ClassVar[int] = 8

    block_size: int | None = whole(None, least=2)
    n_factors: int | None = whole(None, found=True)
    rescale: bool = flag(True)

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its blocks settled for a matrix ``(..., rows, columns)``."""
        columns = shape[-1]
        if columns == 1:
            raise AdaptationError(
                "a matrix of one column has nothing to rotate: a rotation needs two inputs"
            )
        factors = self.n_factors or (2 if columns % 4 == 0 else 1)
        if factors > 1 and columns % 2**factors:
            raise AdaptationError(
                f"n_factors {factors} needs a multiple of {2**factors} columns, and its matrix has "
                f"{columns} (n_factors=None takes what each matrix can have)"
            )
        sizes = divisors(columns)[1:]
        refusal = f"does not divide the {columns} columns of its matrix"
        if factors > 1:
            sizes = [size for size in divisors(columns >> (factors - 1)) if size % 2 == 0]
            refusal = (
                f"is odd, or {2 ** (factors - 1)} times as much does not divide the {columns} "
                "columns of its matrix"
            )
        fitted: Self = with_settings(self.cut(sizes, refusal), n_factors=factors)
        return fitted

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``Q`` and factors of one, so that nothing is rotated or rescaled."""
        *groups, rows, columns = matrix.shape
        size, factors = self.block_size, self.n_factors
        assert size is not None
        assert factors is not None
        like = self.factory_kwargs(matrix)
        blocks = columns // size, size * (size - 1) // 2
        made = {"boft_Q": torch.zeros(*groups, factors, *blocks, **like)}
        return made | ({"boft_s": torch.ones(*groups, rows, 1, **like)} if self.rescale else {})

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``diag(s) W0 R^T``."""
        for i, change in enumerate(self.changes(parameters)):
            matrix = matrix + _unpaired(times_blocks(_paired(matrix, i, change), change), i, change)
        return matrix * parameters["boft_s"] if self.rescale else matrix

    def changes(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return for each factor what its blocks change, ``(..., n, b, b)``."""
        assert self.block_size is not None
        return rotation_change(parameters["boft_Q"], self.block_size).unbind(-4)


def _paired(rows: Tensor, factor: int, blocks: Tensor) -> Tensor:
    """Bring the half-blocks that a factor rotates together next to each other."""
    if factor == 0:
        return rows
    halves = rows.unflatten(-1, (-1, 2, 2**factor, blocks.shape[-1] // 2))
    together: Tensor = halves.transpose(-3, -2).flatten(-4)
    return together


def _unpaired(rows: Tensor, factor: int, blocks: Tensor) -> Tensor:
    """Bring the half-blocks back to where they were."""
    if factor == 0:
        return rows
    halves = rows.unflatten(-1, (-1, 2**factor, 2, blocks.shape[-1] // 2))
    together: Tensor = halves.transpose(-3, -2).flatten(-4)
    return together


def _linear(
    method: BOFT,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``s o (W0 (R^T x)) + bias``."""
    blocks = [change.mT for change in method.changes(parameters)]
    turned = checkpointed(_turned, x, blocks, product.outputs, product.ways)
    output = product.output(turned, bias)
    if not method.rescale:
        return output

    # The annotation is quoted, since the compiler of torch 2.6 cannot evaluate unions.
    def again(x: Tensor, bias: "Tensor | None", *blocks: Tensor) -> Tensor:
        return product.output(_turned(x, *blocks), bias)

    inputs = (x, bias, *blocks)
    scales = finite(parameters["boft_s"], bias)
    return rescaled(output, *scales, again, inputs, ways=product.ways)


def _turned(x: Tensor, *blocks: Tensor) -> Tensor:
    """Compute ``R^T x`` from ``(R^T - I)^T`` of each factor, in the dtype of `x`."""
    turned = x
    for i, change in reversed([*enumerate(blocks)]):
        rows = _paired(turned.reshape(-1, x.shape[-1]).to(change.dtype), i, change)
        turned = turned + _unpaired(times_blocks(rows, change), i, change).view(x.shape)
    return turned.to(x.dtype)


BOFT.forwards = linear_forwards(_linear)
