"""DEFT: a subspace is taken out of the weight and another one put in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import low_rank_product
from gift.kernels.products import scaled
from gift.methods.base import ScaledMethod, register_method
from gift.methods.settings import choice


@register_method
@dataclass(frozen=True)
class DEFT(ScaledMethod):
    r"""Decompositional efficient fine-tuning (Kumar et al. 2025,
    https://arxiv.org/abs/2509.22793).

    .. math:: W' = (I - Q T^H) W_0 + s \, Q R

    From a matrix `P` follow `Q` and `T`: either ``Q = P`` and ``T = ReLU(P)``, or both are the
    orthogonal factor of the QR decomposition of `P`. What lies in a subspace of the outputs is
    removed, and `R` is put in its place. `R` starts at what is removed, as in PEFT, so that nothing
    changes. Only its change is trained: for a matrix ``(rows, columns)`` this adds ``deft_P (rows,
    r)``, normal with deviation 0.02, and ``deft_R (r, columns)``, which starts at zero. That is ``r
    * (rows + columns)`` parameters. The buffer ``deft_P0``, the start of `P`, is saved with them:

    .. math:: W' = W_0 + Q \left( s R + (T_0 - T)^H W_0 \right)

    A linear layer applies these two factors to its input.

    Args:
        rank: `r`, at most the number of rows. None means 8, or less for a matrix with fewer rows.
        alpha: :math:`s = \alpha / r`; None means `r`, so that `s` is 1.
        decomposition: ``"relu"`` or ``"qr"``.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "deft"
    strategy_prefix: ClassVar[str] = "DEFT"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h", "balanced")
    default_rank: ClassVar[int] = 8

    decomposition: str = choice("relu", "qr")

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """Return the number of rows."""
        return shape[-2]

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a random `P`, a zero change of `R`, and the start of `P`."""
        *groups, rows, columns = matrix.shape
        rank, like = self.rank, self.factory_kwargs(matrix)
        assert rank is not None
        p = 0.02 * torch.randn(*groups, rows, rank, **like)
        return {
            "deft_P": p,
            "deft_R": torch.zeros(*groups, rank, columns, **like),
            "deft_P0": nn.Buffer(p.clone()),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + Q (s R + (T0 - T)^H W0)``."""
        left, right = self.factors(matrix, parameters)
        return matrix + left @ right

    def factors(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `Q` and ``s R + (T0 - T)^H W0``, whose product is the delta of this matrix."""
        q, t = self.projection(parameters["deft_P"])
        moved = (self.projection(parameters["deft_P0"])[1] - t).mH
        removed = moved @ matrix.to(torch.promote_types(moved.dtype, matrix.dtype))
        return q, scaled(parameters["deft_R"], self.scaling) + removed

    def projection(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return `Q` and `T` for `P`, in float32 or better."""
        p = p.to(torch.promote_types(p.dtype, torch.float32))
        if self.decomposition == "qr":
            q = torch.linalg.qr(p)[0]
            return q, q
        if p.is_complex():
            return p, torch.complex(torch.relu(p.real), torch.relu(p.imag))
        return p, torch.relu(p)


def _linear(
    method: DEFT,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Apply the factors, of which one is a thin product with the frozen matrix."""
    return low_rank_product(x, product, bias, method.factors(product.matrix, parameters))


DEFT.forwards = linear_forwards(_linear)
