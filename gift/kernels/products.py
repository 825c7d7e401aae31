"""Matrix products with one thin operand, as a delta's factors are, and the effective weight.

Activations for many rows or positions have shape ``(features, columns)``, or in parts ``(parts,
features, columns)``: on a CPU one product for each part is up to twice as fast as one for all. The
matrix with few rows comes first: the other order takes several times as long. Where channels come
in groups, each with a matrix of its own, the groups of each example are parts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply a matrix by the columns of `x`."""
    return matrix @ x if x.dim() == 2 else torch.bmm(for_each(matrix, x), x)


def outer(few: Tensor, many: Tensor, groups: int = 1) -> Tensor:
    """Sum outer products over all columns: ``(features of few, features of many)``.

    With several groups these are the matrices of each, in front of which is an axis of groups.
    """
    if few.dim() == 2:
        return few @ many.mT
    each = torch.bmm(few, many.mT)
    if groups == 1:
        return each.sum(0)
    return each.reshape(each.shape[0] // groups, groups, *each.shape[1:]).sum(0)


def for_each(matrix: Tensor, parts: Tensor) -> Tensor:
    """Expand a matrix, or one for each group, to the number of parts."""
    if matrix.dim() == 2:
        return matrix.expand(parts.shape[0], -1, -1)
    return matrix.repeat(parts.shape[0] // matrix.shape[0], 1, 1)


def rows_of(x: Tensor) -> Tensor:
    """Return `x` as ``(rows, features)``, without a copy if it is contiguous."""
    return x.reshape(-1, x.shape[-1])


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Multiply a tensor by a number, which is often 1 and then costs nothing."""
    return tensor if scale == 1 else tensor * scale


def linear_output(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute ``W x + bias`` for a matrix that is held as ``(out, in)``, or ``(in, out)``."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = rows_of(x)
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def effective(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Compute ``W + s left right``, where the product's rows are pieces of the weight in order."""
    if not weight.is_contiguous():  # channels last, or transposed
        return weight.add((left @ right).reshape(weight.shape), alpha=scale)
    return torch.addmm(weight.reshape(len(left), -1), left, right, alpha=scale).view(weight.shape)


def times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Multiply rows by a matrix with blocks on its diagonal.

    Args:
        rows: ``(..., rows, columns)``.
        blocks: ``(..., n, b, b)`` with ``n b`` columns, or one block for all.
    """
    parts = rows.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum("...rni,...nij->...rnj", parts, blocks).flatten(-2)
