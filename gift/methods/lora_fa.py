"""LoRA-FA: LoRA with a frozen A."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gift.methods.base import register_method
from gift.methods.lora import LoRA


@register_method
@dataclass(frozen=True)
class LoRAFA(LoRA):
    r"""LoRA with frozen ``A`` (Zhang et al. 2023, https://arxiv.org/abs/2308.03303).

    .. math:: W' = W_0 + \frac{\alpha}{r} B A

    For a matrix ``(rows, columns)`` it adds ``lora_B (rows, r)``, which is trained and starts at
    zero, and ``lora_A (r, columns)``, Kaiming-uniform as in `LoRA`, which stays frozen. That is ``r
    * rows`` parameters. ``A`` is a buffer that is saved with the delta: it is random, and ``B`` is
    meaningless without it.

    A linear layer needs its input only for the gradients of its weight and of ``A``, and both are
    frozen. So it saves ``A x`` for the backward pass, `r` numbers for each token. (A layer that
    reads its weight, like a convolution, saves its input all the same.) PEFT multiplies the
    gradient of ``B`` by :math:`(A A^T)^{-1}` for this method. Here that is left to the optimizer.

    Args:
        rank: as in `LoRA`, like all other arguments.
    """

    name: ClassVar[str] = "lora_fa"
    strategy_prefix: ClassVar[str] = "LoRAFA"

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return LoRA's factors; only ``B`` is trained."""
        factors = super().init_parameters(matrix)
        return factors | {"lora_A": nn.Buffer(factors["lora_A"])}
