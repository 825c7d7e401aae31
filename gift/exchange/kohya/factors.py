"""Factors of one matrix that are written in another way and mean the same, exactly.

kohya files tell a delta for the matrix ``(outputs, inputs * kernel)`` of a layer. gift may hold its
factors for another view of the weight, and such files may hold a core of Tucker's decomposition, or
a rank that gift refuses because the matrix cannot have it. All of these are products of two factors
for that one matrix.
"""

import torch
from torch import Tensor

from gift.layers import Layout

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


def without_core(core: Tensor, right: Tensor) -> Tensor:
    """Tucker's core ``(r, r, *kernel)`` and ``right (r, inputs)`` as ``(r, inputs * kernel)``."""
    merged = torch.einsum("mn...,nj->mj...", core.double(), right.double())
    return merged.flatten(1).to(right.dtype)


def for_groups(left: Tensor, right: Tensor, groups: int) -> Pair:
    """Factors of the whole matrix as those of each group of a convolution, which share `right`."""
    if groups == 1:
        return left, right
    return left.unflatten(0, (groups, -1)), right.expand(groups, *right.shape)


def for_whole(left: Tensor, right: Tensor, layout: Layout, outputs: int) -> Pair:
    """Gift's factors in any layout of a convolution as those of the one matrix.

    A balanced layout cuts each row of that matrix into chunks, which are rows of its own: they
    stand side by side, each with a copy of `right`. Groups stand below each other.

    Args:
        left: ``(rows, r)``, or one for each group.
        right: ``(r, columns)``, or one for each group.
        layout: in which they are.
        outputs: rows of the one matrix.
    """
    if len(layout.matrix) == 2:
        left, right = left[None], right[None]
    groups, rows, rank = left.shape
    chunks = groups * rows // outputs
    if chunks > 1:
        left = left.reshape(groups, rows // chunks, chunks * rank)
        right = torch.stack([torch.block_diag(*[one] * chunks) for one in right])
    return smallest(torch.block_diag(*left), right.flatten(0, 1))
