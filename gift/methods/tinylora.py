"""TinyLoRA: LoRA-XS by a few numbers for a whole network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift.methods.base import register_method
from gift.methods.draws import seeded_buffer
from gift.methods.principal import PrincipalMethod
from gift.methods.settings import flag, whole


@register_method
@dataclass(frozen=True)
class TinyLoRA(PrincipalMethod):
    r"""TinyLoRA (Morris et al. 2026, https://arxiv.org/abs/2602.04118).

    .. math:: W' = W_0 + U_r \Sigma_r \Big( \sum_{i=1}^{u} v_i P_i \Big) V_r^H, \quad
        W_0 = U \operatorname{diag}(\sigma) V^H

    The vector ``tiny_v (u,)`` starts at zero. All matrices of the network share it: `u` parameters,
    whatever the size of the network. The buffer ``tiny_P (u, r, r)`` is random with deviation ``1 /
    sqrt(r)``, drawn from the seed, never saved, and the same for all matrices of one rank. The
    factors are buffers, see `PrincipalMethod`.

    PEFT puts the roots of the singular values on both sides and draws another `P` for each layer,
    which is another function of `v`.

    Args:
        rank: `r`. None means 2, or less for a smaller matrix.
        u: number of trained numbers.
        tied: whether all matrices share `v`, else each has its own.
        seed: seed of `P`.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of `v` and the factors, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "tinylora"
    strategy_prefix: ClassVar[str] = "TinyLoRA"
    prefix: ClassVar[str] = "tiny"
    derives: ClassVar[tuple[str, ...]] = ("tiny_B", "tiny_A")
    default_rank: ClassVar[int] = 2

    u: int = whole(64)
    tied: bool = flag(True)
    seed: int = whole(42, least=0)

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        """The vector, if it is tied."""
        return ("tiny_v",) if self.tied else ()

    def start(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero `v` and the random matrices."""
        assert self.rank is not None
        like, groups = self.factory_kwargs(matrix), () if self.tied else matrix.shape[:-2]
        shape = (self.u, self.rank, self.rank)
        return {
            "tiny_v": torch.zeros(*groups, self.u, **like),
            "tiny_P": seeded_buffer(_normal, self.seed, shape, **like),
        }

    def between(self, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`\sum_i v_i P_i`."""
        return torch.einsum("...u,upq->...pq", parameters["tiny_v"], parameters["tiny_P"])

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `v` by the number."""
        return {**parameters, "tiny_v": parameters["tiny_v"] * number}


def _normal(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draw numbers of deviation ``1 / sqrt(r)``."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn / math.sqrt(shape[-1])
