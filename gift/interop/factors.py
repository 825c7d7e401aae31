"""Conversions of factors of a matrix to equivalent factors."""

import torch
from torch import Tensor

from gift.methods.factors import in_double

Pair = tuple[Tensor, Tensor]


def product(left: Tensor, right: Tensor) -> Tensor:
    """Compute ``left @ right`` in float64, and round once."""
    return (left.double() @ right.double()).to(left.dtype)


def smallest(left: Tensor, right: Tensor) -> Pair:
    """Reduce factors ``(..., rows, r)``, ``(..., r, columns)`` to a rank that a matrix can have."""
    rows, columns = left.shape[-2], right.shape[-1]
    if left.shape[-1] <= min(rows, columns):
        return left, right
    whole = product(left, right)
    one = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    one = one.expand(*whole.shape[:-2], *one.shape)
    return (one, whole) if rows <= columns else (whole, one)


def for_outputs(left: Tensor, right: Tensor, outputs: int) -> Pair:
    """Convert factors of a matrix with several rows per output to factors with one row per output.

    A balanced layout cuts each output into chunks, which are separate rows. They are placed side
    by side, each with a copy of `right`.
    """
    chunks = len(left) // outputs
    return left.reshape(outputs, -1), torch.block_diag(*[right] * chunks)


def magnitude_change(magnitude: Tensor, matrix: Tensor) -> Tensor:
    """Return the difference of magnitudes from the norms of the rows of a matrix, in float64.

    Raises:
        ValueError: if the matrix has rows of zeros.
    """
    norm = in_double(matrix).norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise ValueError("its weight has rows of zeros, which have no direction for DoRA")
    return magnitude.to(norm).reshape(norm.shape) - norm
