"""Deltas of one matrix that are written in another way and mean the same."""

import torch
from torch import Tensor

from gift.methods.factors import in_double

Pair = tuple[Tensor, Tensor]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, computed in float64 and rounded once."""
    return (left.double() @ right.double()).to(left.dtype)


def smallest(left: Tensor, right: Tensor) -> Pair:
    """Factors ``(..., rows, r)`` and ``(..., r, columns)``, with a rank that a matrix can have."""
    rows, columns = left.shape[-2], right.shape[-1]
    if left.shape[-1] <= min(rows, columns):
        return left, right
    whole = product(left, right)
    one = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    one = one.expand(*whole.shape[:-2], *one.shape)
    return (one, whole) if rows <= columns else (whole, one)


def for_outputs(left: Tensor, right: Tensor, outputs: int) -> Pair:
    """Factors of a matrix with several rows for each output as those of one with a row for each.

    A balanced layout cuts each output into chunks, which are rows of its own: they stand side by
    side, each with a copy of `right`.
    """
    chunks = len(left) // outputs
    return left.reshape(outputs, -1), torch.block_diag(*[right] * chunks)


def magnitude_change(magnitude: Tensor, matrix: Tensor) -> Tensor:
    """By how much magnitudes differ from those of the rows of a matrix, in float64.

    Raises:
        ValueError: if it has rows of zeros.
    """
    norm = in_double(matrix).norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise ValueError("its weight has rows of zeros, which have no direction for DoRA")
    return magnitude.to(norm).reshape(norm.shape) - norm
