"""MiSS: one shard of the update, repeated along the inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.linear import Product, linear_forwards
from gift.methods.base import RankedMethod, register_method


@register_method
@dataclass(frozen=True)
class MiSS(RankedMethod):
    r"""Matrix shard sharing (Kang and Yin 2024, https://arxiv.org/abs/2409.15371), first published
    as Bone (block affine).

    .. math:: W' = W_0 + D \, [I_r \; I_r \cdots I_r], \quad \text{that is} \quad
        \Delta W_{o,i} = D_{o, \, i \bmod r}

    All blocks of `r` inputs share one shard `D`; the last block may be cut. For a matrix ``(rows,
    columns)`` it adds ``miss_D (rows, r)``, which starts at zero. That is ``r * rows`` parameters,
    half of LoRA's for a square matrix. A linear layer sums the blocks of its input and multiplies
    the sum by `D`, which is the cheapest of all deltas of rank `r`.

    PEFT holds `D` transposed. Its variant ``"bat"`` is another function, and not part of this one.

    Args:
        rank: `r`, at most the number of columns. None means 8, or less for fewer columns.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of `D`, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "miss"
    strategy_prefix: ClassVar[str] = "MiSS"
    conv_layouts = ("out_as_h", "balanced")
    default_rank: ClassVar[int] = 8

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """Return the number of columns."""
        return shape[-1]

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``D``."""
        assert self.rank is not None
        shape = (*matrix.shape[:-1], self.rank)
        return {"miss_D": torch.zeros(shape, **self.factory_kwargs(matrix))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + D [I ... I]``."""
        shard, columns = parameters["miss_D"], matrix.shape[-1]
        return matrix + torch.cat([shard] * -(-columns // shard.shape[-1]), -1)[..., :columns]

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the shard by the number."""
        return {"miss_D": parameters["miss_D"] * number}


def _linear(
    method: MiSS,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 x + bias`` plus `D` times the sum of the blocks of ``x``."""
    shard = parameters["miss_D"]
    rank, output = shard.shape[-1], product.output(x, bias)
    padded = F.pad(x.to(shard.dtype), (0, -x.shape[-1] % rank))
    total = padded.unflatten(-1, (-1, rank)).sum(-2)
    return (output + F.linear(total, shard)).to(output.dtype)


MiSS.forwards = linear_forwards(_linear)
