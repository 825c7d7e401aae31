"""RandLoRA: a full-rank update of random low-rank bases with trained scales."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gift.methods.base import Method, register_method
from gift.methods.draws import seeded_buffer
from gift.methods.settings import flag, number, whole


@register_method
@dataclass(frozen=True)
class RandLoRA(Method):
    r"""Full-rank adaptation by random bases (Albert et al. 2025, https://arxiv.org/abs/2502.00987).

    .. math:: W' = W_0 + \frac{\alpha}{r} \sum_{j=1}^{n} B_j \Lambda_j A \Gamma_j, \quad
        n = \lceil d / r \rceil

    `d` is the smaller side of the matrix and `D` the larger one; if rows are fewer than columns,
    the sum is that of the transpose. :math:`\Lambda_j` and :math:`\Gamma_j` are diagonal. For a
    matrix ``(rows, columns)`` it adds ``randlora_lambda (n, r)``, which starts at zero, and
    ``randlora_gamma (n, d)``, which starts at ``1 / max(n, d)``. That is ``n * (r + d)``
    parameters: the fewer, the larger `r` is. The buffers ``randlora_A (r, d)`` and ``randlora_B (n,
    D, r)`` are frozen, uniform with deviation one, and drawn from the seed. They are never saved by
    default, and the same for all matrices of one shape, whose memory they share; ``B`` is about as
    large as the weight.

    PEFT pairs the scales of basis `j` with columns of other bases where ``n`` and `r` are above
    one, which is the same method with another random ``B``.

    Args:
        rank: `r`, the rank of each basis. It does not limit the rank of the update.
        alpha: :math:`\alpha`; None means ``20 r``, PEFT's default, so that the scaling is 20.
        seed: seed of the random bases.
        save_projection: whether to save the bases with the delta.
        dtype: dtype of scales and bases, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "randlora"
    strategy_prefix: ClassVar[str] = "RandLoRA"
    conv_layouts = ("out_as_h", "balanced")

    rank: int = whole(32)
    alpha: float | None = number(None)
    seed: int = whole(0, least=0)
    save_projection: bool = flag()

    @property
    def scaling(self) -> float:
        """The factor that multiplies the sum."""
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zero and constant scales, and the random bases."""
        *groups, rows, columns = matrix.shape
        small, large, rank = min(rows, columns), max(rows, columns), self.rank
        count = -(-small // rank)
        like = self.factory_kwargs(matrix)
        bases = {
            "randlora_A": seeded_buffer(_uniform, self.seed, (*groups, rank, small), **like),
            "randlora_B": seeded_buffer(_uniform, self.seed, (*groups, count, large, rank), **like),
        }
        if self.save_projection:
            bases = {name: nn.Buffer(drawn.detach().clone()) for name, drawn in bases.items()}
        return {
            "randlora_lambda": torch.zeros(*groups, count, rank, **like),
            "randlora_gamma": torch.full((*groups, count, small), 1 / max(count, small), **like),
            **bases,
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0`` plus the scaled sum of the bases."""
        scales = self.scaling * parameters["randlora_lambda"]
        left = parameters["randlora_B"] * scales.unsqueeze(-2)
        right = parameters["randlora_A"].unsqueeze(-3) * parameters["randlora_gamma"].unsqueeze(-2)
        change = torch.einsum("...nlr,...nrs->...ls", left, right)
        rows, columns = matrix.shape[-2:]
        return matrix + (change if rows >= columns else change.mT)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the scales of the bases by the number."""
        return {**parameters, "randlora_lambda": parameters["randlora_lambda"] * number}


def _uniform(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draw numbers of deviation one."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (2 * drawn - 1) * math.sqrt(3)
