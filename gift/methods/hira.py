"""HiRA: a low-rank matrix times the weight, element by element."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import kaiming_uniform


@register_method
@dataclass(frozen=True)
class HiRA(RankedMethod):
    r"""Hadamard high-rank adaptation (Huang et al. 2025,
    https://openreview.net/forum?id=TwJrTz9cRS).

    .. math:: W' = W_0 + W_0 \odot (B A)

    The update has up to `r` times the rank of the weight. For a matrix ``(rows, columns)`` it adds
    ``hira_B (rows, r)``, which starts at zero, and ``hira_A (r, columns)``, Kaiming-uniform as in
    `LoRA`. That is ``r * (rows + columns)`` parameters. An element that is zero stays zero, so
    that pruned weights stay pruned.

    Args:
        rank: `r`. None means 32, or less for a smaller matrix.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "hira"
    strategy_prefix: ClassVar[str] = "HiRA"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h", "balanced")
    default_rank: ClassVar[int] = 32

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``B`` and a random ``A``."""
        *groups, rows, columns = matrix.shape
        assert self.rank is not None
        like = self.factory_kwargs(matrix)
        return {
            "hira_B": torch.zeros(*groups, rows, self.rank, **like),
            "hira_A": kaiming_uniform(*groups, self.rank, columns, **like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + W0 o (B A)``."""
        return matrix + matrix * (parameters["hira_B"] @ parameters["hira_A"])

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply ``B`` by the number."""
        return {**parameters, "hira_B": parameters["hira_B"] * number}
