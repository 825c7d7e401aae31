"""Conversions of factors from and to kohya files.

kohya files describe a delta of the matrix ``(outputs, inputs * kernel)`` of a layer. gift may
store factors for another view of the weight. Such files may also have a core of a Tucker
decomposition, or a rank that gift refuses because the matrix cannot have it. All of these are
converted to products of two factors for that one matrix.
"""

import torch
from torch import Tensor

from gift.interop.factors import Pair, for_outputs, smallest
from gift.layers.layouts import Layout


def without_core(core: Tensor, right: Tensor) -> Tensor:
    """Merge the core ``(r, r, *kernel)`` into ``right (r, inputs)``: ``(r, inputs * kernel)``."""
    merged = torch.einsum("mn...,nj->mj...", core.double(), right.double())
    return merged.flatten(1).to(right.dtype)


def for_groups(left: Tensor, right: Tensor, groups: int) -> Pair:
    """Split factors of the whole matrix into those of convolution groups, which share `right`."""
    if groups == 1:
        return left, right
    return left.unflatten(0, (groups, -1)), right.expand(groups, *right.shape)


def for_whole(left: Tensor, right: Tensor, layout: Layout, outputs: int) -> Pair:
    """Convert gift's factors in any layout of a convolution to factors of the one matrix.

    Groups are stacked vertically.

    Args:
        left: ``(rows, r)``, or one for each group.
        right: ``(r, columns)``, or one for each group.
        layout: layout of the factors.
        outputs: number of rows of the one matrix.
    """
    if len(layout.matrix) == 2:
        left, right = left[None], right[None]
    groups = [for_outputs(*pair, outputs // len(left)) for pair in zip(left, right, strict=True)]
    lefts, rights = zip(*groups, strict=True)
    return smallest(torch.block_diag(*lefts), torch.cat(rights))
