"""The methods of the matrix: one row each, with the paper's formula written again.

A formula gets a frozen matrix and what the method added for it, all in float64, and gives the
effective matrix. It is differentiated by autograd, so it is also the reference for gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Formula = Callable[[Tensor, Parameters], Tensor]


@dataclass(frozen=True)
class MethodCase:
    """One method with its settings.

    Args:
        method: its name.
        formula: from a frozen matrix and what the method added, the effective matrix.
        count: from rows and columns of a matrix, the number of trained parameters.
        settings: the method's settings.
        view: what a row of the matrix is to the method: see `LayerCase.view`.
        scales_bias: whether the formula also holds for a bias, seen as a column.
        impossible: layer types to which the method cannot be applied, each with the reason, which
            is part of the error.
        differs: properties that do not hold, by layer type and property, each with its reason.
    """

    method: str
    formula: Formula
    count: Callable[[int, int], int]
    settings: dict[str, Any] = field(default_factory=dict)
    view: str = "matrices"
    scales_bias: bool = False
    impossible: dict[str, str] = field(default_factory=dict)
    differs: dict[str, dict[str, str]] = field(default_factory=dict)


def low_rank(scaling: Callable[[int], float]) -> Formula:
    """``W0 + s B A``, element by element; `scaling` takes the rank."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        b, a = p["lora_B"], p["lora_A"]
        return w0 + scaling(a.shape[0]) * torch.einsum("oq,qi->oi", b, a)

    return formula


def low_rank_count(rank: int) -> Callable[[int, int], int]:
    def count(rows: int, columns: int) -> int:
        return min(rank, rows, columns) * (rows + columns)

    return count


def singular_shifts(w0: Tensor, p: Parameters) -> Tensor:
    """``U diag(relu(sigma + delta)) V^T``; that U and V are what they should be is told apart."""
    u, vh = p["svdiff_U"], p["svdiff_Vh"]
    sigma = torch.einsum("or,oi,ri->r", u, w0, vh)
    return torch.einsum("or,r,ri->oi", u, torch.relu(sigma + p["svdiff_delta"]), vh)


def magnitude_and_direction(detach: bool) -> Formula:
    """``m V / |V|``, where the gradient sees the norm of V or not."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        v = w0 + torch.einsum("oq,qi->oi", p["lora_B"], p["lora_A"])
        norm = v.square().sum(1, keepdim=True).sqrt()
        magnitude = w0.square().sum(1, keepdim=True).sqrt() + p["dora_delta_m"]
        return magnitude * v / (norm.detach() if detach else norm)

    return formula


def scaled_outputs(w0: Tensor, p: Parameters) -> Tensor:
    """``diag(l) W0``; where a bias is a part of several, the part's own factors."""
    return torch.einsum("o,oi->oi", p["ia3_l"].flatten(), w0)


def scaled_inputs(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 diag(l)``."""
    return torch.einsum("i,oi->oi", p["ia3_l"].flatten(), w0)


SIGN = {"gradients": "the direction of a single number is its sign, which does not move"}

METHODS: dict[str, MethodCase] = {
    "lora": MethodCase("lora", low_rank(lambda rank: 1.0), low_rank_count(3)),
    "lora_scaled": MethodCase(
        "lora",
        low_rank(lambda rank: 5.0 / rank),
        low_rank_count(2),
        {"rank": 2, "lora_alpha": 5, "clip_rank": True},
    ),
    "rslora": MethodCase(
        "rslora",
        low_rank(lambda rank: 3.0 / math.sqrt(rank)),
        low_rank_count(2),
        {"rank": 2, "lora_alpha": 3, "clip_rank": True},
    ),
    "dora": MethodCase(
        "dora",
        magnitude_and_direction(detach=True),
        lambda rows, columns: low_rank_count(3)(rows, columns) + rows,
        view="outputs",
    ),
    "dora_full_gradient": MethodCase(
        "dora",
        magnitude_and_direction(detach=False),
        lambda rows, columns: low_rank_count(2)(rows, columns) + rows,
        {"rank": 2, "clip_rank": True, "detach_norm": False},
        view="outputs",
        differs={"norm_weight": SIGN, "raw_vector": SIGN},
    ),
    "ia3": MethodCase(
        "ia3", scaled_outputs, lambda rows, columns: rows, view="outputs", scales_bias=True
    ),
    "ia3_feedforward": MethodCase(
        "ia3", scaled_inputs, lambda rows, columns: columns, {"feedforward": True}, "outputs"
    ),
    "svdiff": MethodCase("svdiff", singular_shifts, min, view="filters"),
}
