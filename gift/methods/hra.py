"""HRA: chains of reflections."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.errors import AdaptationError
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import low_rank_product
from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import is_integer, setting


def _is_even(value: Any) -> bool:
    return is_integer(value) and value >= 2 and value % 2 == 0


@register_method
@dataclass(frozen=True)
class HRA(RankedMethod):
    r"""Householder reflection adaptation (Yuan et al. 2024, https://arxiv.org/abs/2405.17484).

    .. math:: W' = W_0 H_1 H_2 \cdots H_r, \quad H_i = I - 2 \frac{u_i u_i^H}{\|u_i\|^2}

    For a matrix ``(rows, columns)`` it adds ``hra_u (r, columns)``, one reflection for each row.
    They start in equal pairs, each drawn like LoRA's ``A``: a reflection applied twice is the
    identity. That is ``r * columns`` parameters.

    Rounding would leave a trace of each reflection, so the product is computed by its difference
    from the identity. For unit vectors `u`, `v` of a pair and their difference `d` it is

    .. math:: H_u H_v = I + L R, \quad L = [u, \, d - 2 (u^H d) u], \quad
        R = \begin{bmatrix} 2 d^H \\ -2 v^H \end{bmatrix},

    exactly the identity where `d` is zero. The chain of all pairs is :math:`I + L (I - N)^{-1} R`
    with their `L` and `R` side by side, and `N` the part above the 2 x 2 blocks on the diagonal of
    ``R L``. A linear layer applies that to its input and does not make the effective weight.

    Args:
        rank: `r`, the number of reflections; even, and at most the number of columns. None means 8,
            or less for a matrix with fewer columns.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the vectors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "hra"
    strategy_prefix: ClassVar[str] = "HRA"
    conv_layouts = ("out_as_h",)
    default_rank: ClassVar[int] = 8
    split_axes = {"hra_u": (None, 1)}
    split_by = ("rows",)  # a reflection mixes the columns

    rank: int | None = setting(None, "an even number, for they start as equal pairs", _is_even)

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """Return the largest even number of reflections for that many columns."""
        return shape[-1] // 2 * 2

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its rank settled for a matrix ``(..., rows, columns)``."""
        if shape[-1] == 1:
            raise AdaptationError(
                "a matrix of one column has nothing to rotate: two reflections of one number cancel"
            )
        return super().fit(shape)

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return random vectors, each of them twice."""
        *groups, _, columns = matrix.shape
        assert self.rank is not None
        half = kaiming_uniform(*groups, self.rank // 2, columns, **self.factory_kwargs(matrix))
        return {"hra_u": half.repeat_interleave(2, -2)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + W0 L (I - N)^{-1} R``."""
        left, right = self.factors(parameters)
        return matrix + (matrix @ left) @ right

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``L (columns, r)`` and ``(I - N)^{-1} R (r, columns)`` in float32 or better."""
        vectors = parameters["hra_u"]
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        first, second = vectors.unflatten(-2, (-1, 2)).unbind(-2)
        length, other = (
            torch.linalg.vector_norm(half, dim=-1, keepdim=True) for half in (first, second)
        )
        u, v = first / length, second / other
        # v - u from the difference of the vectors themselves, which is zero at the start however a
        # device rounds norms.
        gap = second - first
        longer = (gap.conj() * (first + second)).sum(-1, keepdim=True).real / (length + other)
        d = (gap - u * longer) / other
        along = (u.conj() * d).sum(-1, keepdim=True)
        left = torch.stack([u, d - 2 * along * u], -2).flatten(-3, -2).mT
        right = torch.stack([2 * d.conj(), -2 * v.conj()], -2).flatten(-3, -2)
        pair = torch.arange(left.shape[-1], device=left.device) // 2
        above = (pair[:, None] < pair) * (right @ left).to(right.dtype)
        solved = torch.linalg.solve_triangular(-above, right, upper=True, unitriangular=True)
        return left, solved


def _turned(
    method: HRA,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 (x + L (I - N)^{-1} R x) + bias``, for many inputs by the factor ``W0 L``."""
    left, right = method.factors(parameters)
    matrix = product.matrix if type(product) is Product else None
    if matrix is not None and matrix.dtype == left.dtype and 2 * x.numel() > matrix.numel():
        return low_rank_product(x, product, bias, (matrix @ left, right))
    change = F.linear(F.linear(x.to(right.dtype), right), left)
    return product.output((x + change).to(x.dtype), bias)


HRA.forwards = linear_forwards(_turned)
