"""GraLoRA: a low-rank delta for each block of the weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.kernels.checkpointed import checkpointed
from gift.kernels.linear import Product, linear_forwards
from gift.methods.base import ScaledMethod, register_method, with_settings
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import whole


@register_method
@dataclass(frozen=True)
class GraLoRA(ScaledMethod):
    r"""Granular low-rank adaptation (Jung et al. 2025, https://arxiv.org/abs/2505.20355).

    .. math:: W' = W_0 + \frac{\alpha}{r} \begin{bmatrix} B_{11} A_{11} & \cdots & B_{1k} A_{1k} \\
        \vdots & & \vdots \\ B_{k1} A_{k1} & \cdots & B_{kk} A_{kk} \end{bmatrix}

    Each of `k` times `k` blocks has factors of rank ``r / k``, so that the update has the
    parameters of a LoRA of rank `r` and up to `k` times its rank. For a matrix ``(rows, columns)``
    it adds ``gralora_B (k, rows / k, r)``, whose entry `j` holds :math:`B_{j1}, \dots, B_{jk}` side
    by side and which starts at zero, and ``gralora_A (k, r, columns / k)``, whose entry `n` holds
    :math:`A_{1n}, \dots, A_{kn}` above each other, uniform in ``±1/sqrt(columns / k)``. That is ``r
    * (rows + columns)`` parameters.

    A linear layer applies the factors to its input and makes no weight. The paper's hybrid, with a
    LoRA for the whole weight beside the blocks, is not part of it.

    Args:
        rank: `r`, a multiple of `k`. None means 4, or less for a smaller matrix.
        alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        n_blocks: `k`, which must divide rows and columns. None means 2, or 1 where 2 does not.
        clip_rank: whether a matrix that cannot have the rank gets the nearest one below; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "gralora"
    strategy_prefix: ClassVar[str] = "GraLoRA"
    shows_matrix: ClassVar[bool] = True
    default_rank: ClassVar[int] = 4

    n_blocks: int | None = whole(None, found=True)

    @property
    def compat_settings(self) -> dict[str, Any]:
        """The rank and the scaling."""
        return {"rank": self.rank, "scaling": self.scaling}

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its rank and blocks settled for ``(..., rows, columns)``."""
        rows, columns = shape[-2:]
        common = math.gcd(rows, columns)
        k = self.n_blocks or (1 if common % 2 else 2)
        if common % k:
            raise AdaptationError(
                f"n_blocks {k} does not divide both sides of its matrix, {rows} x {columns} "
                "(n_blocks=None takes what each matrix can have)"
            )
        rank = self.default_rank if self.rank is None else self.rank
        largest = min(rows, columns)
        possible = max(k, min(rank, largest) // k * k)
        blocks: Self = with_settings(self, n_blocks=k)
        return blocks.settled(
            possible,
            f"rank {rank} is not a multiple of {k} up to {largest}, as {k} blocks along each side "
            f"of a matrix of {rows} x {columns} need ({possible}, or clip_rank=True, would work)",
        )

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``B`` and a random ``A``."""
        *groups, rows, columns = matrix.shape
        k, rank = self.n_blocks, self.rank
        assert k is not None
        assert rank is not None
        like = self.factory_kwargs(matrix)
        return {
            "gralora_B": torch.zeros(*groups, k, rows // k, rank, **like),
            "gralora_A": kaiming_uniform(*groups, k, rank, columns // k, **like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0`` plus the products of all blocks."""
        b, a = parameters["gralora_B"], parameters["gralora_A"]
        k = b.shape[-3]
        left, right = b.unflatten(-1, (k, -1)), a.unflatten(-2, (k, -1))
        blocks = torch.einsum("...jons,...njsi->...joni", left, right)
        return matrix + self.scaling * blocks.reshape(matrix.shape)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply ``B`` by the number."""
        return {**parameters, "gralora_B": parameters["gralora_B"] * number}


def _linear(
    method: GraLoRA,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 x + bias`` plus the blocks' products with the blocks of ``x``."""
    output, factors = product.output(x, bias), [parameters["gralora_B"], parameters["gralora_A"]]
    change = checkpointed(_blocks, x, factors, product.outputs, product.ways)
    return (output + method.scaling * change).to(output.dtype)


def _blocks(x: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Compute the blocks' products with the blocks of ``x``."""
    k = len(b)
    parts = x.reshape(-1, x.shape[-1]).to(a.dtype).unflatten(-1, (k, -1))
    hidden = torch.einsum("pni,nri->pnr", parts, a).unflatten(-1, (k, -1))
    hidden = hidden.transpose(1, 2).flatten(-2)  # for each block of outputs, from all of inputs
    return torch.einsum("pjr,jor->pjo", hidden, b).reshape(*x.shape[:-1], -1)


GraLoRA.forwards = linear_forwards(_linear)
