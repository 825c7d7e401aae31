"""DeLoRA: a low-rank delta whose strength is a parameter of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.kernels.low_rank import low_rank_forwards
from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import number


@register_method
@dataclass(frozen=True)
class DeLoRA(RankedMethod):
    r"""Decoupled low-rank adaptation (Bini et al. 2025, https://arxiv.org/abs/2503.18225).

    .. math:: W' = W_0 + \frac{\lambda}{r} \sum_{i=1}^{r} \frac{b_i}{\|b_i\|}
        \frac{a_i^T}{\|a_i\|} \operatorname{diag}(c), \quad c_j = \|W_0 e_j\|

    The factors give the direction of the update and :math:`\lambda` its strength: scaled to columns
    of norm one, its Frobenius norm is at most :math:`\lambda`. For a matrix ``(rows, columns)`` it
    adds ``delora_B (rows, r)``, whose columns are :math:`b_i` and which starts at zero, ``delora_A
    (r, columns)``, whose rows are :math:`a_i^T`, Kaiming-uniform as in `LoRA`, and ``delora_lambda
    (1,)``. That is ``r * (rows + columns) + 1`` parameters. The buffer ``delora_c (columns,)``
    holds the norms of the frozen columns. It is never saved but recomputed from the weight.

    Norms below 1e-4 count as 1e-4, as in PEFT, so that the update is zero where ``B`` is. (The
    paper starts at two random factors and subtracts their product from the frozen weight.)

    Args:
        rank: `r`. None means 8, or less for a smaller matrix.
        delora_lambda: initial value of :math:`\lambda`.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the parameters, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "delora"
    strategy_prefix: ClassVar[str] = "DeLoRA"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h", "balanced")
    rows_are_outputs: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    derives: ClassVar[tuple[str, ...]] = ("delora_c",)
    default_rank: ClassVar[int] = 8

    delora_lambda: float = number(15.0, enters_weight=False)

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``B``, a random ``A``, the strength, and the norms of the columns."""
        *groups, rows, columns = matrix.shape
        assert self.rank is not None
        like = self.factory_kwargs(matrix)
        (norms,) = self.derived(matrix).values()
        real: Any = {"dtype": self.delta_dtype(matrix).to_real(), "device": matrix.device}
        return {
            "delora_B": torch.zeros(*groups, rows, self.rank, **like),
            "delora_A": kaiming_uniform(*groups, self.rank, columns, **like),
            "delora_lambda": torch.full((*groups, 1), self.delora_lambda, **real),
            "delora_c": nn.Buffer(norms, persistent=False),
        }

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the norm of each column."""
        precise = matrix.to(self.working_dtype(matrix))
        return {"delora_c": torch.linalg.vector_norm(precise, dim=-2)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0`` plus the product of the factors."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return ``B`` with columns of norm :math:`\lambda / r`, and ``A`` with scaled columns."""
        given = parameters["delora_B"], parameters["delora_A"]
        # In 16 bits, the gradient of a small norm overflows.
        b, a = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in given)
        norms = [torch.linalg.vector_norm(f, dim=d).clamp_min(1e-4) for f, d in ((b, -2), (a, -1))]
        strength = parameters["delora_lambda"] / a.shape[-2] / (norms[0] * norms[1])
        return b * strength.unsqueeze(-2), a * parameters["delora_c"].unsqueeze(-2)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the strength by the number."""
        return {**parameters, "delora_lambda": parameters["delora_lambda"] * number}


DeLoRA.forwards = low_rank_forwards()
