"""OLoRA: LoRA that starts with orthonormal columns."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gift.methods.anchored import AnchoredLoRA
from gift.methods.base import register_method
from gift.methods.factors import qr


@register_method
@dataclass(frozen=True)
class OLoRA(AnchoredLoRA):
    r"""Orthonormal low-rank adaptation (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775).

    .. math:: W' = W_0 + s (B A - B_0 A_0), \quad B_0 = Q_r, \quad A_0 = R_r, \quad
        W_0 = Q R, \quad s = \frac{\alpha}{r}

    The factors start at the first `r` columns of `Q` and rows of `R` of the weight's QR
    decomposition with a positive diagonal of `R`. For a matrix ``(rows, columns)`` it adds ``lora_B
    (rows, r)`` and ``lora_A (r, columns)``, which start at ``olora_B0`` and ``olora_A0``, so that
    nothing changes at the start. That is ``r * (rows + columns)`` parameters.

    ``B0`` and ``A0`` are saved with the delta, which makes a state twice as large as LoRA's. In
    return, loading needs neither the decomposition nor the base weight that it was computed from.
    The trained delta is a LoRA of rank ``2 r``, see `gift.methods.anchored`.

    Args:
        lora_dropout: probability with which an input of ``B A`` is dropped while training. Inputs
            of ``W0 - s B0 A0`` are not dropped, so outputs in training mode differ from the base
            even at the start.
        rank: as in `LoRA`, like all other arguments.
    """

    name: ClassVar[str] = "olora"
    strategy_prefix: ClassVar[str] = "OLoRA"

    def start(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first columns of `Q` and rows of `R`."""
        q, r = qr(matrix)
        return q[..., : self.rank], r[..., : self.rank, :]
