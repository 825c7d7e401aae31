"""SHiRA: train a few elements of the weight itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import seeded_buffer, sorted_entries
from gift.methods.settings import choice, whole


@register_method
@dataclass(frozen=True)
class SHiRA(RankedMethod):
    r"""Sparse high-rank adaptation (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175).

    .. math:: W' = W_0 + M \odot S

    `M` is a mask with `k` ones. Only those elements of `S` matter. They start at zero, so that the
    update is zero. For a matrix ``(rows, columns)`` it adds ``shira_S (k,)`` with ``k = r (rows +
    columns)``, as many as LoRA of rank `r` has, but at most one for each element. That is `k`
    parameters, for each group of a weight with groups. A buffer ``shira_M (k,)`` holds their
    positions in the flattened matrix in ascending order.

    Args:
        rank: `r`, which only determines the number of elements. None means 3, or less for a smaller
            matrix.
        mask: ``"random"`` draws the elements from the seed, as PEFT does. They are the same for all
            matrices of one shape, but differ between the groups of a weight, and are never saved.
            ``"magnitude"`` takes the elements of largest absolute value. These are saved with the
            delta, since another base, or another order of equal values, would give other elements.
        seed: seed of the random mask.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the values, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "shira"
    strategy_prefix: ClassVar[str] = "SHiRA"

    mask: str = choice("random", "magnitude")
    seed: int = whole(0, least=0)

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """Whether elements are chosen by magnitude."""
        return self.mask == "magnitude"

    @property
    def compat_settings(self) -> dict[str, Any]:
        """The settings that choose the elements; without the seed if the elements are saved."""
        values = super().compat_settings
        return {k: v for k, v in values.items() if not (k == "seed" and self.reads_weight)}

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zeros at the chosen elements."""
        assert self.rank is not None
        size, sides = math.prod(matrix.shape[-2:]), sum(matrix.shape[-2:])
        shape = (*matrix.shape[:-2], min(self.rank * sides, size))
        if self.reads_weight:
            largest = matrix.detach().abs().flatten(-2).topk(shape[-1]).indices
            chosen: Tensor = nn.Buffer(largest.sort(-1).values)
        else:
            chosen = seeded_buffer(sorted_entries, self.seed, shape, size, device=matrix.device)
        return {"shira_S": torch.zeros(shape, **self.factory_kwargs(matrix)), "shira_M": chosen}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + M o S``."""
        # A dense sum has the memory layout of the matrix even where that is read transposed, so the
        # layer's kernels round as before.
        values, where = parameters["shira_S"].to(matrix.dtype), parameters["shira_M"]
        update = torch.zeros_like(matrix).flatten(-2).scatter(-1, where, values)
        return matrix + update.view(matrix.shape)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the elements by the number."""
        return {**parameters, "shira_S": parameters["shira_S"] * number}
