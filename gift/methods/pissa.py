"""PiSSA: LoRA that starts at the principal components of the weight."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gift.methods.anchored import AnchoredLoRA
from gift.methods.base import register_method
from gift.methods.factors import svd
from gift.methods.settings import positive


@register_method
@dataclass(frozen=True)
class PiSSA(AnchoredLoRA):
    r"""Principal singular values and vectors adaptation (Meng et al. 2024,
    https://arxiv.org/abs/2404.02948).

    .. math:: W' = W_0 + s (B A - B_0 A_0), \quad
        B_0 = U_r \sqrt{S_r / s}, \quad A_0 = \sqrt{S_r / s} \, V_r^H, \quad
        W_0 = U \operatorname{diag}(S) V^H, \quad s = \frac{\alpha}{r}

    The factors start at the `r` largest singular values with their vectors, so that the first steps
    change the principal components of the weight. For a matrix ``(rows, columns)`` it adds ``lora_B
    (rows, r)`` and ``lora_A (r, columns)``, which start at ``pissa_B0`` and ``pissa_A0``, so that
    nothing changes at the start. That is ``r * (rows + columns)`` parameters.

    ``B0`` and ``A0`` are saved with the delta, which makes a state twice as large as LoRA's. In
    return, loading needs neither the decomposition nor the base weight that it was computed from.
    The trained delta is a LoRA of rank ``2 r``, see `gift.methods.anchored`. Directions with a
    singular value of zero have zero factors, which get no gradient.

    Args:
        lora_alpha: :math:`\alpha`, above zero; None means `r`, so that the scaling is 1.
        lora_dropout: probability with which an input of ``B A`` is dropped while training. Inputs
            of ``W0 - s B0 A0`` are not dropped, so outputs in training mode differ from the base
            even at the start.
        rank: as in `LoRA`, like all other arguments.
    """

    name: ClassVar[str] = "pissa"
    strategy_prefix: ClassVar[str] = "PiSSA"

    lora_alpha: float | None = positive(None)

    def start(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the singular vectors of the largest values, times the square roots of these."""
        u, sigma, vh = svd(matrix)
        r = self.rank
        root = (sigma[..., :r] / self.scaling).sqrt()
        return u[..., :r] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :r, :]
