"""Products of matrices of which one is thin, as a delta's factors are, and the effective weight.

What many rows or positions make is given as ``(features, columns)``, or in parts as ``(parts,
features, columns)``: on a processor one product for each part is up to twice as fast as one for
all. The matrix with few rows comes first: the other way round takes several times as long.
"""

import torch
from torch import Tensor


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix times the columns of `x`."""
    return matrix @ x if x.dim() == 2 else torch.bmm(for_each(matrix, x), x)


def outer(few: Tensor, many: Tensor) -> Tensor:
    """``(features of few, features of many)``: their products over all columns."""
    return few @ many.mT if few.dim() == 2 else torch.bmm(few, many.mT).sum(0)


def for_each(matrix: Tensor, parts: Tensor) -> Tensor:
    """A matrix, seen as often as there are parts."""
    return matrix.expand(parts.shape[0], -1, -1)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """The tensor times a number that is often 1."""
    return tensor if scale == 1 else tensor * scale


def effective(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``W + s left right``: the rows of the product are pieces of the weight, in their order."""
    if not weight.is_contiguous():  # channels last, or transposed
        return weight.add((left @ right).reshape(weight.shape), alpha=scale)
    return torch.addmm(weight.reshape(len(left), -1), left, right, alpha=scale).view(weight.shape)
