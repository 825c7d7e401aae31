"""The methods of the matrix: one row each, with the paper's formula written again in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Parameters = dict[str, np.ndarray]


@dataclass(frozen=True)
class MethodCase:
    """One method with its settings.

    Args:
        method: its name.
        reference: from a frozen matrix and the parameters for it, the effective matrix.
        count: from rows and columns of a matrix, the number of parameters that it adds.
        settings: the method's settings.
    """

    method: str
    reference: Callable[[np.ndarray, Parameters], np.ndarray]
    count: Callable[[int, int], int]
    settings: dict[str, Any] = field(default_factory=dict)


def low_rank(scaling: Callable[[int], float]) -> Callable[[np.ndarray, Parameters], np.ndarray]:
    """``W0 + s B A``, element by element; `scaling` takes the rank."""

    def reference(w0: np.ndarray, p: Parameters) -> np.ndarray:
        b, a = p["lora_B"], p["lora_A"]
        return w0 + scaling(a.shape[0]) * np.einsum("oq,qi->oi", b, a)

    return reference


def low_rank_count(rank: int) -> Callable[[int, int], int]:
    def count(rows: int, columns: int) -> int:
        return min(rank, rows, columns) * (rows + columns)

    return count


METHODS: dict[str, MethodCase] = {
    "lora": MethodCase("lora", low_rank(lambda rank: 1.0), low_rank_count(3)),
    "lora_scaled": MethodCase(
        "lora",
        low_rank(lambda rank: 5.0 / rank),
        low_rank_count(2),
        {"rank": 2, "lora_alpha": 5, "clip_rank": True},
    ),
    "rslora": MethodCase(
        "lora",
        low_rank(lambda rank: 3.0 / math.sqrt(rank)),
        low_rank_count(2),
        {"rank": 2, "lora_alpha": 3, "use_rslora": True, "clip_rank": True},
    ),
}
