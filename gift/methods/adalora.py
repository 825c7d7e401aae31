"""AdaLoRA: a delta in the form of a singular value decomposition, whose rank can be pruned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.low_rank import low_rank_forwards
from gift.kernels.products import scaled
from gift.methods.base import ScaledMethod, register_method
from gift.methods.settings import probability


@register_method
@dataclass(frozen=True)
class AdaLoRA(ScaledMethod):
    r"""Adaptive budget allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

    .. math:: W' = W_0 + \frac{\alpha}{r} P \operatorname{diag}(\lambda \odot m) Q

    For a matrix ``(rows, columns)`` it adds ``adalora_P (rows, r)`` and ``adalora_Q (r, columns)``,
    both normal with deviation 0.02, and ``adalora_lambda (r,)``, which starts at zero. That is ``r
    * (rows + columns + 1)`` parameters. The mask ``adalora_mask (r,)`` is a buffer of ones that is
    saved with the delta. `gift.schedules.RankAllocator` decides while training which of the `r`
    triplets each weight keeps: it sets the other `lambda` to zero, and in the end the mask too.
    Without an allocator all are kept.

    `gift.schedules.orthogonality` returns how far `P` and `Q` are from orthogonal, to be added to
    the loss, which makes the triplets comparable.

    Args:
        rank: `r`, the rank from which the allocator prunes. None means 12, or less for a smaller
            matrix.
        alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        adalora_dropout: probability with which an input of the delta is dropped while training, as
            in `LoRA`.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the parameters, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "adalora"
    strategy_prefix: ClassVar[str] = "AdaLoRA"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h", "balanced")
    default_rank: ClassVar[int] = 12
    split_axes = {
        **{"adalora_P": (0, None), "adalora_Q": (None, 1)},
        **{"adalora_lambda": (None, None), "adalora_mask": (None, None)},
    }

    adalora_dropout: float = probability()

    @property
    def dropout(self) -> float:  # type: ignore[override]
        """The dropout probability for `drop`."""
        return self.adalora_dropout

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return random `P` and `Q`, zero `lambda`, and a mask of ones."""
        *groups, rows, columns = matrix.shape
        assert self.rank is not None
        like = self.factory_kwargs(matrix)
        real: dict[str, Any] = like | {"dtype": torch.empty(0, dtype=like["dtype"]).real.dtype}
        return {
            "adalora_P": 0.02 * torch.randn(*groups, rows, self.rank, **like),
            "adalora_lambda": torch.zeros(*groups, self.rank, **like),
            "adalora_Q": 0.02 * torch.randn(*groups, self.rank, columns, **like),
            "adalora_mask": nn.Buffer(torch.ones(*groups, self.rank, **real)),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`W_0 + s P \operatorname{diag}(\lambda \odot m) Q`."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``s P diag(lambda * mask)`` and `Q`."""
        left, right, scale = self.scaled_low_rank(parameters)
        return scaled(left, scale), right

    def scaled_low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return ``P diag(lambda * mask)``, `Q` and the scaling."""
        kept = parameters["adalora_lambda"] * parameters["adalora_mask"]
        left = parameters["adalora_P"] * kept.unsqueeze(-2)
        return left, parameters["adalora_Q"], self.scaling

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `lambda` by the number."""
        return {**parameters, "adalora_lambda": parameters["adalora_lambda"] * number}

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop input features: columns of `Q`, or rows of `P` in embeddings."""
        key = "adalora_Q" if input_axis == -1 else "adalora_P"
        factor = parameters[key]
        mask = F.dropout(factor.new_ones(factor.shape[input_axis]), self.adalora_dropout)
        return {**parameters, key: factor * (mask if input_axis == -1 else mask[:, None])}


AdaLoRA.forwards = low_rank_forwards()
