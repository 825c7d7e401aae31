"""LoRA whose start is made from data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift.methods.anchored import AnchoredLoRA
from gift.methods.base import register_method
from gift.methods.draws import kaiming_uniform


@register_method
@dataclass(frozen=True)
class GuidedLoRA(AnchoredLoRA):
    r"""LoRA with a start from data: `gift.initialise` by LoRA-GA (Wang et al. 2024,
    https://arxiv.org/abs/2407.05000) or CorDA (Yang et al. 2024, https://arxiv.org/abs/2406.05223).

    .. math:: W' = W_0 + s (B A - B_0 A_0), \quad s = \frac{\alpha}{r}

    For a matrix ``(rows, columns)`` it adds ``lora_B (rows, r)`` and ``lora_A (r, columns)``, which
    start at ``guided_B0`` and ``guided_A0``, so that nothing changes at the start: ``r * (rows +
    columns)`` parameters. Until `gift.initialise` sets all four, it is a LoRA: ``B0`` is zero.

    ``B0`` and ``A0`` are saved with the delta, so loading needs no data. The trained delta is a
    LoRA of rank ``2 r``, see `gift.methods.anchored`.

    Args:
        lora_dropout: probability with which an input of ``B A`` is dropped while training. Inputs
            of ``W0 - s B0 A0`` are not dropped.
        rank: as in `LoRA`, like all other arguments.
    """

    name: ClassVar[str] = "guided"
    strategy_prefix: ClassVar[str] = "GuidedLoRA"
    reads_weight: ClassVar[bool] = False

    def start(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return a zero left factor and a right one drawn as in LoRA."""
        assert self.rank is not None
        *groups, rows, columns = matrix.shape
        like = self.factory_kwargs(matrix)
        left = torch.zeros(*groups, rows, self.rank, **like)
        return left, kaiming_uniform(*groups, self.rank, columns, **like)
