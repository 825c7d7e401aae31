"""GLoRA: weights and biases that are scaled, shifted and mixed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.methods.base import RankedMethod, of_each_weight, register_method
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import choice


@register_method
@dataclass(frozen=True)
class GLoRA(RankedMethod):
    r"""Generalised LoRA (Chavan et al. 2023, https://arxiv.org/abs/2306.07967).

    .. math:: W' = W_0 + W_0 \odot A + B, \quad b' = b + b \odot D + E + W_0 c

    `A` and `B` are products of factors ``glora_A_d (rows, r)`` and ``glora_A_u (r, columns)``, and
    ``glora_B_d``, ``glora_B_u`` alike; or ``glora_A``, ``glora_B`` of shape ``(rows, 1)`` or ``(1,
    1)``. `c` is the product of ``glora_C_d (columns, r)`` and ``glora_C_u (r, 1)``, or ``glora_C
    (columns, 1)``. ``glora_D`` and ``glora_E`` have shape ``(rows, 1)`` or ``(1, 1)``. The second
    factors are Kaiming-uniform as in `LoRA`, all else starts at zero. That is ``2 r (rows +
    columns)`` parameters for `A` and `B` of a weight, and ``r (columns + 1) + 2`` for its bias by
    default. A layer without bias has `A` and `B` only; so has `pa_adapt`, which changes only the
    parameter that it is given.

    The paper searches the form of each of the five for each layer. Here caps choose it.

    Args:
        rank: `r`. None means 8, or less for a smaller matrix.
        a_b: form of `A` and `B`: ``"lora"``, ``"vector"`` or ``"constant"``.
        c: form of `c`: ``"lora"``, ``"vector"`` or ``"none"``.
        d_e: form of `D` and `E`: ``"constant"``, ``"vector"`` or ``"none"``.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the parameters, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "glora"
    strategy_prefix: ClassVar[str] = "GLoRA"
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True
    scales_outputs: ClassVar[bool] = True
    default_rank: ClassVar[int] = 8

    a_b: str = choice("lora", "vector", "constant")
    c: str = choice("lora", "vector", "none")
    d_e: str = choice("constant", "vector", "none")

    @property
    def bias_reads_weight(self) -> bool:  # type: ignore[override]
        """Whether the frozen matrix is a part of the bias."""
        return self.c != "none"

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return `A` and `B`, which are zero."""
        return self._zero("A", matrix, self.a_b) | self._zero("B", matrix, self.a_b)

    def init_bias_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return `c`, `D` and `E`, which are zero."""
        column = matrix[..., :1, :].mT
        made = self._zero("C", column, self.c)
        return made | self._zero("D", matrix, self.d_e) | self._zero("E", matrix, self.d_e)

    def _zero(self, name: str, matrix: Tensor, form: str) -> dict[str, Tensor]:
        *groups, rows, columns = matrix.shape
        like: dict[str, Any] = self.factory_kwargs(matrix)
        if form == "lora":
            assert self.rank is not None
            return {
                f"glora_{name}_d": torch.zeros(*groups, rows, self.rank, **like),
                f"glora_{name}_u": kaiming_uniform(*groups, self.rank, columns, **like),
            }
        if form == "none":
            return {}
        return {f"glora_{name}": torch.zeros(*groups, rows if form == "vector" else 1, 1, **like)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + W0 o A + B``."""
        a, b = _of("A", parameters), _of("B", parameters)
        return matrix + matrix * a + b

    def effective_bias(self, bias: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``b + b o D + E + W0 c``; an infinite bias stays as it is."""
        each = of_each_weight(parameters)
        parts = bias.chunk(len(each), -2)
        made = []
        for part, own in zip(parts, each, strict=True):
            new = part
            if self.d_e != "none":
                finite = torch.where(part.abs() < math.inf, part, 0)
                new = new + finite * own["glora_D"] + own["glora_E"]
            if self.c != "none":
                c = _of("C", own)
                new = new + own["frozen"].to(c.dtype) @ c
            made.append(new)
        return torch.cat(made, -2)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `A`, `B`, `c`, `D` and `E` by the number."""
        return {
            key: value if key.endswith("_u") else value * number
            for key, value in parameters.items()
        }


def _of(name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a support tensor, whichever form it has."""
    whole = parameters.get(f"glora_{name}")
    if whole is not None:
        return whole
    return parameters[f"glora_{name}_d"] @ parameters[f"glora_{name}_u"]
