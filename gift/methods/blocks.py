"""Methods that cut a matrix into blocks, and rotations of blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.methods.base import Method
from gift.methods.settings import flag, whole


@dataclass(frozen=True)
class BlockMethod(Method):
    """Base class of methods with blocks of one size, which must divide something of the matrix.

    Args:
        block_size: size of a block. None means the possible size nearest to `default_block_size`.
        clip_block_size: whether a matrix that cannot have the size gets the nearest one it can
            have. None means yes, with a warning that names the matrix, unless no matrix can have
            the size, which is an error. False makes every such matrix an error. True clips without
            a warning.
        dtype: dtype of the new parameters, or its name; None means the weight's, but at least
            float32.
    """

    size_setting: ClassVar[str | None] = "block_size"
    default_block_size: ClassVar[int] = 32

    block_size: int | None = whole(None)
    clip_block_size: bool | None = flag(None, enters_weight=False, kw_only=True)

    def cut(self, sizes: Sequence[int], refusal: str) -> Self:
        """Return the method with a block size that the matrix can have.

        Args:
            sizes: the possible sizes, in ascending order.
            refusal: why a size is refused, after the size and before those that would do.
        """
        wanted = self.block_size or self.default_block_size
        near = [*[n for n in sizes if n < wanted][-1:], *[n for n in sizes if n > wanted][:1]]
        return self.settled(
            nearest(sizes, wanted),
            f"block_size {wanted} {refusal} "
            f"({' or '.join(map(str, near))} would, or clip_block_size=True)",
        )


def nearest(sizes: Sequence[int], wanted: int) -> int:
    """Return the size nearest to the wanted one, and of two the smaller."""
    found = sizes[0]
    for size in sizes[1:]:  # the compiler of torch 2.6 knows no `min` with a key
        gap, least = abs(size - wanted), abs(found - wanted)
        found = size if (gap, size) < (least, found) else found
    return found


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def rotation_change(upper: Tensor, size: int) -> Tensor:
    r"""Return what rotations change: :math:`R^T - I`, exactly zero where `Q` is.

    .. math:: R = (I + Q) (I - Q)^{-1}, \quad Q = -Q^H, \quad R^T - I = -2 (I + Q)^{-1} Q

    Args:
        upper: upper triangles of `Q`, row by row, ``(..., size * (size - 1) / 2)``.
        size: size of the matrices.

    Returns:
        Matrices ``(..., size, size)`` in float32 or better.
    """
    q = upper.to(torch.promote_types(upper.dtype, torch.float32))  # no half-precision solver
    row, column = torch.triu_indices(size, size, 1, device=q.device)
    above = q.new_zeros(*q.shape[:-1], size * size).index_add(-1, row * size + column, q)
    above = above.unflatten(-1, (size, size))
    skew = above - above.mH
    one = torch.eye(size, dtype=q.dtype, device=q.device)
    # I + Q is always invertible: a check would only make a GPU synchronise.
    turned: Tensor = torch.linalg.solve_ex(one + skew, -2 * skew)[0]
    return turned
