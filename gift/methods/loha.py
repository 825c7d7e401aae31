"""LoHa: the Hadamard product of two low-rank matrices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.kernels.conv_layers import conv, conv_forwards, effective_conv
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import linear
from gift.kernels.merged_linear import terms, through_weight
from gift.methods.base import ScaledMethod, register_method


@register_method
@dataclass(frozen=True)
class LoHa(ScaledMethod):
    r"""Low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098;
    LoHa in LyCORIS, https://arxiv.org/abs/2309.14859).

    .. math:: W' = W_0 + \frac{\alpha}{r} (B_1 A_1) \odot (B_2 A_2)

    For a matrix ``(rows, columns)`` it adds ``loha_B1 (rows, r)``, ``loha_A1 (r, columns)``,
    ``loha_B2 (rows, r)`` and ``loha_A2 (r, columns)``, for each group of a weight with groups. That
    is ``2 r (rows + columns)`` parameters for an update of rank up to :math:`r^2`. ``B2`` starts at
    zero, so that the product is zero. The others are normal with standard deviation 0.1 (``B1``)
    and 1 (``A1``, ``A2``), as in LyCORIS.

    Args:
        rank: `r`. None means 3, or less for a smaller matrix.
        alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "loha"
    strategy_prefix: ClassVar[str] = "LoHa"
    shows_matrix: ClassVar[bool] = True
    low_rank_is_cheap: ClassVar[bool] = False
    conv_layouts = ("out_as_h", "balanced")
    split_axes = {
        **dict.fromkeys(("loha_B1", "loha_B2"), (0, None)),
        **dict.fromkeys(("loha_A1", "loha_A2"), (None, 1)),
    }

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return one factor that is zero, and normal others."""
        assert self.rank is not None
        *groups, rows, columns = matrix.shape
        like = self.factory_kwargs(matrix)
        left, right = (*groups, rows, self.rank), (*groups, self.rank, columns)
        return {
            "loha_B1": torch.empty(left, **like).normal_(std=0.1),
            "loha_A1": torch.empty(right, **like).normal_(),
            "loha_B2": torch.zeros(left, **like),
            "loha_A2": torch.empty(right, **like).normal_(),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + s (B1 A1) o (B2 A2)``."""
        first = parameters["loha_B1"] @ parameters["loha_A1"]
        second = parameters["loha_B2"] @ parameters["loha_A2"]
        return torch.addcmul(matrix, first, second, value=self.scaling)

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return factors of rank ``r^2``: products of all column pairs, and of all row pairs."""
        b1, a1, b2, a2 = (parameters[f"loha_{factor}"] for factor in ("B1", "A1", "B2", "A2"))
        b = (b1[..., :, :, None] * b2[..., :, None, :]).flatten(-2)
        a = (a1[..., :, None, :] * a2[..., None, :, :]).flatten(-3, -2)
        return b, a * self.scaling

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply ``B2`` by the number."""
        return {**parameters, "loha_B2": parameters["loha_B2"] * number}


def _linear(
    method: LoHa,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Use the factors of rank ``r^2``, or the effective weight if that is cheaper."""
    rows, rank = parameters["loha_B1"].shape
    if terms(x, rows, rank**2).go_beside(torch.is_grad_enabled()):
        return linear(method, parameters, x, product, bias, training)
    return through_weight(method, parameters, x, product, bias)


def _conv(self: Any, input: Tensor) -> Tensor:
    """Use LoRA's path for convolutions, which saves less even where it makes the weight."""
    rank = self._gift_weights["weight"].method.rank
    if rank is None or rank > 8:  # summing r^2 terms takes longer than the Hadamard product
        return effective_conv(self, input)
    return conv(self, input)


LoHa.forwards = linear_forwards(_linear) | conv_forwards(_conv)
