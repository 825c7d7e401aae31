"""FacT: one tensor for the updates of all layers, in factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift.kernels.low_rank import low_rank_forwards
from gift.kernels.products import scaled
from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import number


@register_method
@dataclass(frozen=True)
class FacT(RankedMethod):
    r"""Factor-tuning, in the form of a tensor train (Jie and Deng 2022,
    https://arxiv.org/abs/2212.03145).

    .. math:: W'_l = W_l + s \, U \Sigma_l V

    The updates of all layers `l` are slices of one tensor, whose outer factors they share. For a
    matrix ``(rows, columns)`` it adds ``fact_S (r, r)``, and shares ``fact_U (rows, r)`` with all
    matrices of as many rows and ``fact_V (r, columns)`` with all of as many columns, each of them
    one parameter. `V` starts at zero, `U` and `S` are Kaiming-uniform, as in the authors' code.
    That is ``r * r`` parameters for each matrix, and ``r`` for each row and column that occurs.

    The paper's matrices are all as wide as the network; it cuts wider ones into such pieces, where
    here each width has a factor of its own.

    Args:
        rank: `r`. None means 16, or less for a smaller matrix, which then shares with others of
            that rank.
        scaling: `s`.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "fact"
    strategy_prefix: ClassVar[str] = "FacT"
    conv_layouts = ("out_as_h", "balanced")
    shared: ClassVar[tuple[str, ...]] = ("fact_U", "fact_V")
    default_rank: ClassVar[int] = 16

    scaling: float = number(1.0)

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return random `U` and `S`, and a zero `V`."""
        *groups, rows, columns = matrix.shape
        rank, like = self.rank, self.factory_kwargs(matrix)
        assert rank is not None
        return {
            "fact_U": kaiming_uniform(rank, rows, **like).T.contiguous(),
            "fact_S": kaiming_uniform(*groups, rank, rank, **like),
            "fact_V": torch.zeros(rank, columns, **like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`W_l + s U \Sigma_l V`."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return :math:`s U \Sigma_l` and `V`."""
        middle, right = parameters["fact_S"], parameters["fact_V"]
        left = parameters["fact_U"] @ scaled(middle, self.scaling)
        return left, right.expand(*middle.shape[:-2], *right.shape)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `S` by the number."""
        return {**parameters, "fact_S": parameters["fact_S"] * number}


FacT.forwards = low_rank_forwards()
