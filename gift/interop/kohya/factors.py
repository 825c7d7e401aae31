"""Factors as kohya files have them.

kohya files tell a delta for the matrix ``(outputs, inputs * kernel)`` of a layer. gift may hold its
factors for another view of the weight, and such files may hold a core of Tucker's decomposition, or
a rank that gift refuses because the matrix cannot have it. All of these are products of two factors
for that one matrix.
"""

import torch
from torch import Tensor

from gift.interop.factors import Pair, for_outputs, smallest
from gift.layers.table import Layout


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

    Groups stand below each other.

    Args:
        left: ``(rows, r)``, or one for each group.
        right: ``(r, columns)``, or one for each group.
        layout: in which they are.
        outputs: rows of the one matrix.
    """
    if len(layout.matrix) == 2:
        left, right = left[None], right[None]
    groups = [for_outputs(*pair, outputs // len(left)) for pair in zip(left, right, strict=True)]
    lefts, rights = zip(*groups, strict=True)
    return smallest(torch.block_diag(*lefts), torch.cat(rights))
