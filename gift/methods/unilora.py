"""Uni-LoRA: all factors of a network are one vector, projected."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gift.methods.anchored import AnchoredMethod, Factors
from gift.methods.base import register_method, with_settings
from gift.methods.draws import seeded_buffer, uniform
from gift.methods.settings import at_least_32_bits, positive, whole


@register_method
@dataclass(frozen=True)
class UniLoRA(AnchoredMethod):
    r"""Uni-LoRA (Li et al. 2025, https://arxiv.org/abs/2506.00799).

    .. math:: W' = W_0 + B A - B_0 A_0, \quad
        (B_1, A_1, B_2, A_2, \dots) = P \theta, \quad P^T P = I

    One vector :math:`\theta` of length `d` is all that is trained, whatever the size of the
    network: ``unilora_theta (d,)``, which all matrices share, uniform in ``±init_theta_d_bound`` at
    the start. The `D` entries of all factors, ``r (rows + columns)`` for each matrix, are its
    projection. Each entry is one coordinate of :math:`\theta`, over the root of the number of
    entries that have that coordinate, so that `P` is an isometry. The buffers ``unilora_P_B (rows,
    r)`` and ``unilora_P_A (r, columns)`` say which coordinate. They are drawn from the seed, and so
    are the factors at the start; none of that is saved. Each successive `d` entries of the network
    have all coordinates, in random order, so that no coordinate occurs much more often than
    another. A network with fewer entries than `d` leaves coordinates without use.

    The paper starts at :math:`W_0 + B_0 A_0`. Here the product at the start is subtracted, see
    `gift.methods.anchored`. PEFT draws another `P` from the same seed.

    Args:
        rank: `r`. None means 4, or less for a smaller matrix.
        theta_d_length: `d`.
        init_theta_d_bound: bound of :math:`\theta` at the start.
        seed: seed of `P` and of the start.
        first: number of entries before those of the matrix. It and `entries` need not be given:
            the network determines them when the method is enabled, and files record them.
        entries: `D`. None means that the matrix is the only one.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of :math:`\theta`, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "unilora"
    strategy_prefix: ClassVar[str] = "UniLoRA"
    shared: ClassVar[tuple[str, ...]] = ("unilora_theta",)
    is_part: ClassVar[bool] = True
    default_rank: ClassVar[int] = 4

    theta_d_length: int = whole(23_040)
    init_theta_d_bound: float = positive(0.02)
    seed: int = whole(0, least=0)
    first: int = whole(0, least=0, kw_only=True)
    entries: int | None = whole(None, kw_only=True)

    @property
    def shares_with(self) -> tuple[Any, ...]:
        """What determines the vector at the start, and the projection."""
        return self.seed, self.init_theta_d_bound

    def share(self, shape: tuple[int, ...]) -> int:
        """Return the number of entries of the factors of a matrix ``(..., rows, columns)``."""
        assert self.rank is not None
        *groups, rows, columns = shape
        return math.prod(groups) * self.rank * (rows + columns)

    def placed(self, first: int, total: int) -> Self:
        """Return the method for a matrix with so many entries before it, of so many in all."""
        placed: Self = with_settings(self, first=first, entries=total)
        return placed

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the vector, and what describes the start and the projection."""
        assert self.rank is not None
        *groups, rows, columns = matrix.shape
        like, d = self.factory_kwargs(matrix), self.theta_d_length
        total = self.share(matrix.shape) if self.entries is None else self.entries
        start = seeded_buffer(uniform, self.seed, (d,), self.init_theta_d_bound, **like)
        b, a = (*groups, rows, self.rank), (*groups, self.rank, columns)
        device, after = matrix.device, self.first + math.prod(b)
        return {
            "unilora_theta": start.detach().clone(),
            "unilora_theta0": start,
            "unilora_P_B": seeded_buffer(_coordinates, self.seed, b, d, self.first, device=device),
            "unilora_P_A": seeded_buffer(_coordinates, self.seed, a, d, after, device=device),
            "unilora_norm": seeded_buffer(_norms, self.seed, (d,), total, **like),
            **self.multiplier(matrix),
        }

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return `B` and `A`."""
        return _projected(parameters["unilora_theta"], parameters)

    def anchors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return ``B0`` and ``A0``, of the vector at the start."""
        return _projected(parameters["unilora_theta0"], parameters)


def _projected(theta: Tensor, parameters: Mapping[str, Tensor]) -> Factors:
    """Return the factors that a vector gives, in at least 32 bits."""
    values = theta.to(at_least_32_bits(theta.dtype)) * parameters["unilora_norm"]
    b, a = (
        values.index_select(0, where.flatten()).view(where.shape)
        for where in (parameters["unilora_P_B"], parameters["unilora_P_A"])
    )
    return b, a


def _coordinates(
    generator: torch.Generator, shape: tuple[int, ...], length: int, first: int
) -> Tensor:
    """Choose a coordinate for each of the entries from `first` on."""
    seed, count = generator.initial_seed(), math.prod(shape)
    start, end = first // length, -(-(first + count) // length)
    drawn = torch.cat([_permutation(seed, block, length) for block in range(start, end)])
    # A copy: a slice would keep the whole permutations in memory.
    return drawn[first - start * length :][:count].clone().view(shape)


def _norms(generator: torch.Generator, shape: tuple[int, ...], total: int) -> Tensor:
    """Return one over the root of the number of entries that have a coordinate, for each."""
    (length,) = shape
    blocks, rest = divmod(total, length)
    counts = torch.full(shape, blocks, dtype=torch.float64, device="cpu")
    counts[_permutation(generator.initial_seed(), blocks, length)[:rest]] += 1
    return counts.clamp_min(1).rsqrt()


def _permutation(seed: int, block: int, length: int) -> Tensor:
    """Draw the coordinates in the order of one block of entries."""
    # torch uses 32 bits of a seed on the CPU; a large odd factor keeps seeds apart from blocks.
    generator = torch.Generator().manual_seed((seed + 0x9E3779B1 * (block + 1)) % 2**32)
    return torch.randperm(length, generator=generator, device="cpu")
