"""SHiRA: a few elements of the weight itself."""

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

    `M` is a mask with `k` ones, and `S`, of which only those elements matter, starts at zero, so
    that the update is zero. For a matrix ``(rows, columns)`` it adds ``shira_S (k,)`` with
    ``k = r (rows + columns)``, as many as LoRA of rank `r` has, but at most all of them; for each
    group where there are several. That is `k` parameters. Beside them stands ``shira_M (k,)``,
    where in the flattened matrix they are, in rising order.

    Args:
        rank: `r`, which only says how many elements there are. None means 3, or less where a matrix
            is smaller.
        mask: ``"random"`` draws the elements from the seed, as PEFT does; the same for all matrices
            of one shape, while the groups of a weight have elements of their own. They are never
            saved. ``"magnitude"`` takes those of largest absolute value. These are saved with the
            delta, since another base, or another order of equal values, would give others.
        seed: of the random mask.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: of the values, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "shira"
    strategy_prefix: ClassVar[str] = "SHiRA"

    mask: str = choice("random", "magnitude")
    seed: int = whole(0, least=0)

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """Whether the elements are chosen by their values."""
        return self.mask == "magnitude"

    @property
    def compat_settings(self) -> dict[str, Any]:
        """What chooses the elements; where they are saved, no seed does."""
        values = super().compat_settings
        return {k: v for k, v in values.items() if not (k == "seed" and self.reads_weight)}

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Zeros at the chosen elements."""
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
        """``W0 + M o S``."""
        # Added as a whole: so the result lies in memory as the matrix does, also where it is read
        # transposed, and the layer's kernels round as they did.
        values, where = parameters["shira_S"].to(matrix.dtype), parameters["shira_M"]
        update = torch.zeros_like(matrix).flatten(-2).scatter(-1, where, values)
        return matrix + update.view(matrix.shape)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """The entries times the number."""
        return {**parameters, "shira_S": parameters["shira_S"] * number}
