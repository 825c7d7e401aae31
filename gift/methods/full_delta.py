"""A delta of full rank: fine-tuning of the whole weight, beside the frozen one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift.methods.base import Method, register_method


@register_method
@dataclass(frozen=True)
class FullDelta(Method):
    r"""An update of all elements, a task vector (Ilharco et al. 2023,
    https://arxiv.org/abs/2212.04089).

    .. math:: W' = W_0 + \Delta

    For a matrix ``(rows, columns)`` it adds ``full_delta (rows, columns)``, which starts at zero:
    as many parameters as the weight has. Training computes what full fine-tuning of these weights
    does, up to weight decay, which acts on the update alone. The base stays frozen, so that updates
    can be saved, added, subtracted, switched and taken away, also where others are low-rank.

    Args:
        dtype: dtype of the update, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "full_delta"
    strategy_prefix: ClassVar[str] = "FullDelta"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h", "balanced")

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return an update of zeros."""
        return {"full_delta": torch.zeros(matrix.shape, **self.factory_kwargs(matrix))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + delta``."""
        return matrix + parameters["full_delta"]

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the update by the number."""
        return {"full_delta": parameters["full_delta"] * number}
