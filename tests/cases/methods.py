"""The methods of the matrix: one row each, with the paper's formula written again.

A formula gets a frozen matrix and what the method added for it, all in float64, and gives the
effective matrix. It is differentiated by autograd, so it is also the reference for gradients.
"""

import itertools
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


def hadamard(scaling: Callable[[int], float]) -> Formula:
    """``W0 + s (B1 A1) o (B2 A2)``; `scaling` takes the rank."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        b1, a1, b2, a2 = (p[f"loha_{name}"] for name in ("B1", "A1", "B2", "A2"))
        return w0 + scaling(len(a1)) * torch.einsum("op,pi,oq,qi->oi", b1, a1, b2, a2)

    return formula


def kronecker(scaling: Callable[[int], float]) -> Formula:
    """``W0[i, j] + s w1[i // b, j // d] w2[i % b, j % d]``; `scaling` takes the rank."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        w1, w2 = p.get("lokr_w1"), p.get("lokr_w2")
        if w1 is None:
            w1 = torch.einsum("aq,qc->ac", p["lokr_w1_a"], p["lokr_w1_b"])
        rank = 1 if w2 is not None else len(p["lokr_w2_b"])
        if w2 is None:
            w2 = torch.einsum("bq,qd->bd", p["lokr_w2_a"], p["lokr_w2_b"])
        i, j = torch.meshgrid(*map(torch.arange, w0.shape), indexing="ij")
        (b, d) = w2.shape
        return w0 + scaling(rank) * w1[i // b, j // d] * w2[i % b, j % d]

    return formula


def kronecker_count(rank: int = 3, factor: int = -1, both: bool = False, full: bool = False) -> Any:
    """Parameters of `w1 (a, c)` and `w2 (b, d)`, where ``rows = a b`` and ``columns = c d``."""

    def smaller(size: int) -> int:
        if factor > 0 and size % factor == 0:
            return min(factor, size // factor)
        bound = size if factor < 0 else factor
        return max(n for n in range(1, bound + 1) if size % n == 0 and n * n <= size)

    def count(rows: int, columns: int) -> int:
        a, c = smaller(rows), smaller(columns)
        b, d = rows // a, columns // c
        r = min(rank, b, d)
        first = min(r, a, c) * (a + c) if both else a * c
        return first + (b * d if full else r * (b + d))

    return count


def cosines(scaling: float) -> Formula:
    """Each coefficient is the amplitude of a cosine over the matrix."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        rows, columns = w0.shape
        x, y = torch.arange(rows).double()[:, None], torch.arange(columns).double()
        for c, entry in zip(p["fourierft_c"], p["fourierft_E"].tolist(), strict=True):
            turns = entry // columns * x / rows + entry % columns * y / columns
            w0 = w0 + scaling * c * torch.cos(2 * math.pi * turns) / (rows * columns)
        return w0

    return formula


def chosen_elements(w0: Tensor, p: Parameters) -> Tensor:
    """Each value is added to its element."""
    places = torch.arange(w0.numel())[:, None] == p["shira_M"]
    return w0 + (places.double() @ p["shira_S"]).reshape(w0.shape)


def chosen_count(rank: int) -> Callable[[int, int], int]:
    return lambda rows, columns: min(low_rank_count(rank)(rows, columns), rows * columns)


def scaled_random(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 + diag(b) B diag(d) A``; what B and A should be is told apart."""
    b, d = p["vera_b"], p["vera_d"]
    return w0 + torch.einsum("o,oq,q,qi->oi", b, p["vera_B"], d, p["vera_A"])


def anchored_low_rank(name: str, scaling: Callable[[int], float]) -> Formula:
    """``W0 + s (B A - B0 A0)``; that B0 and A0 are what they should be is told apart."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        moved = torch.einsum("oq,qi->oi", p["lora_B"], p["lora_A"])
        start = torch.einsum("oq,qi->oi", p[f"{name}_B0"], p[f"{name}_A0"])
        return w0 + scaling(len(p["lora_A"])) * (moved - start)

    return formula


def frozen_a_count(rank: int) -> Callable[[int, int], int]:
    return lambda rows, columns: min(rank, rows, columns) * rows


def rotation(values: Tensor, size: int) -> Tensor:
    """``(I + Q) (I - Q)^-1``, where `values` are above the diagonal of a skew-symmetric `Q`."""
    q = torch.zeros(size, size, dtype=torch.float64)
    for (i, j), value in zip(itertools.combinations(range(size), 2), values, strict=True):
        place = torch.zeros(size, size, dtype=torch.float64)
        place[i, j], place[j, i] = 1, -1
        q = q + value * place
    one = torch.eye(size, dtype=torch.float64)
    return (one + q) @ torch.linalg.inv(one - q)


def rotated_blocks(size: int | None = None) -> Formula:
    """``W0 R^T`` with ``R = (I + Q) (I - Q)^-1``, a block of `size` columns after the other."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        b = size or w0.shape[1]
        rotations = [rotation(values, b) for values in p["oft_Q"]]
        if len(rotations) == 1:
            rotations *= w0.shape[1] // b
        return torch.einsum("oi,ji->oj", w0, torch.block_diag(*rotations))

    return formula


def butterflies(w0: Tensor, p: Parameters) -> Tensor:
    """``diag(s) W0 (F_m ... F_1)^T``: a factor turns pairs of half-blocks, far apart in later ones.

    With a single factor, which may have odd blocks, these are turned as they lie.
    """
    columns, (factors, blocks, _) = w0.shape[1], p["boft_Q"].shape
    size = columns // blocks
    places = torch.arange(columns).reshape(-1, size if factors == 1 else size // 2)
    whole = torch.eye(columns, dtype=torch.float64)
    for i, values in enumerate(p["boft_Q"]):
        first = [k for k in range(len(places)) if k // 2**i % 2 == 0]
        pairs = [torch.cat([places[k], places[k + 2**i]]) for k in first if factors > 1]
        for inputs, upper in zip(pairs or places, values, strict=True):
            turn = torch.eye(columns, dtype=torch.float64)
            whole = turn.index_put((inputs[:, None], inputs), rotation(upper, size)) @ whole
    scales = p["boft_s"].flatten() if "boft_s" in p else torch.ones(len(w0)).double()
    return torch.einsum("o,oi,ji->oj", scales, w0, whole)


def butterfly_count(rows: int, columns: int) -> int:
    """Two factors where half-blocks fit, else one; blocks as near to 8 as possible."""
    factors = 1 if columns % 4 else 2
    sizes = [n for n in range(2, columns + 1) if columns % (factors * n) == 0]
    sizes = [n for n in sizes if factors == 1 or n % 2 == 0]
    size = min(sizes, key=lambda n: (abs(n - 8), n))
    return factors * columns * (size - 1) // 2 + rows


def reflections(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 H_1 ... H_r``, one reflection after the other."""
    for u in p["hra_u"]:
        w0 = w0 - 2 * torch.outer(w0 @ u, u) / (u @ u)
    return w0


SIGN = {"gradients": "the direction of a single number is its sign, which does not move"}

ONE_COLUMN = dict.fromkeys(("norm_weight", "raw_vector"), "one column has nothing to")
ODD_COLUMNS = dict.fromkeys(
    ("conv2d_depthwise", "lstm_bidirectional_projected"), "block_size 2 does not divide"
)

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
    "loha": MethodCase(
        "loha",
        hadamard(lambda rank: 1.0),
        lambda rows, columns: 2 * low_rank_count(3)(rows, columns),
        view="filters",
    ),
    "loha_scaled": MethodCase(
        "loha",
        hadamard(lambda rank: 5.0 / rank),
        lambda rows, columns: 2 * low_rank_count(2)(rows, columns),
        {"rank": 2, "alpha": 5, "clip_rank": True},
        "filters",
    ),
    "lokr": MethodCase("lokr", kronecker(lambda rank: 1.0), kronecker_count(), view="filters"),
    "lokr_both_decomposed": MethodCase(
        "lokr",
        kronecker(lambda rank: 5.0 / rank),
        kronecker_count(2, factor=2, both=True),
        {"rank": 2, "alpha": 5, "factor": 2, "decompose_both": True, "clip_rank": True},
        "filters",
    ),
    "lokr_full_matrix": MethodCase(
        "lokr",
        kronecker(lambda rank: 1.0),
        kronecker_count(factor=4, full=True),
        {"full_matrix": True, "factor": 4},
        "filters",
    ),
    "fourierft": MethodCase(
        "fourierft", cosines(9.0), lambda rows, columns: min(1000, rows * columns), {"scaling": 9.0}
    ),
    "fourierft_few": MethodCase(
        "fourierft",
        cosines(7.0),
        lambda rows, columns: 5,
        {"n_frequency": 5, "scaling": 7.0, "seed": 3},
    ),
    "shira": MethodCase("shira", chosen_elements, chosen_count(3)),
    "shira_magnitude": MethodCase(
        "shira", chosen_elements, chosen_count(1), {"rank": 1, "mask": "magnitude"}
    ),
    "vera": MethodCase(
        "vera",
        scaled_random,
        lambda rows, columns: min(256, rows * columns) + rows,
        view="outputs",
    ),
    "vera_small": MethodCase(
        "vera",
        scaled_random,
        lambda rows, columns: 4 + rows,
        {"rank": 4, "seed": 5, "d_initial": 0.3},
        "outputs",
    ),
    "vera_saved_projection": MethodCase(
        "vera",
        scaled_random,
        lambda rows, columns: 3 + rows,
        {"rank": 3, "save_projection": True},
        "outputs",
    ),
    "pissa": MethodCase("pissa", anchored_low_rank("pissa", lambda rank: 1.0), low_rank_count(3)),
    "pissa_scaled": MethodCase(
        "pissa",
        anchored_low_rank("pissa", lambda rank: 5.0 / math.sqrt(rank)),
        low_rank_count(2),
        {"rank": 2, "lora_alpha": 5, "use_rslora": True, "clip_rank": True},
    ),
    "olora": MethodCase("olora", anchored_low_rank("olora", lambda rank: 1.0), low_rank_count(3)),
    "olora_scaled": MethodCase(
        "olora",
        anchored_low_rank("olora", lambda rank: -0.5 / rank),
        low_rank_count(2),
        {"rank": 2, "lora_alpha": -0.5, "clip_rank": True},
    ),
    "lora_fa": MethodCase("lora_fa", low_rank(lambda rank: 1.0), frozen_a_count(3)),
    "lora_fa_scaled": MethodCase(
        "lora_fa",
        low_rank(lambda rank: 5.0 / rank),
        frozen_a_count(2),
        {"rank": 2, "lora_alpha": 5, "clip_rank": True},
    ),
    "oft": MethodCase(
        "oft",
        rotated_blocks(),
        lambda rows, columns: columns * (columns - 1) // 2,
        view="filters",
        impossible=ONE_COLUMN,
    ),
    "oft_blocks": MethodCase(
        "oft",
        rotated_blocks(2),
        lambda rows, columns: columns // 2,
        {"block_size": 2},
        "filters",
        impossible=ONE_COLUMN | ODD_COLUMNS,
    ),
    "oft_shared": MethodCase(
        "oft",
        rotated_blocks(2),
        lambda rows, columns: 1,
        {"block_size": 2, "block_share": True},
        "filters",
        impossible=ONE_COLUMN | ODD_COLUMNS,
    ),
    "boft": MethodCase("boft", butterflies, butterfly_count, view="filters", impossible=ONE_COLUMN),
    "boft_plain": MethodCase(
        "boft",
        butterflies,
        lambda rows, columns: columns // 2,
        {"block_size": 2, "n_factors": 1, "rescale": False},
        "filters",
        impossible=ONE_COLUMN | ODD_COLUMNS,
    ),
    "hra": MethodCase(
        "hra",
        reflections,
        lambda rows, columns: min(8, columns // 2 * 2) * columns,
        view="filters",
        impossible=ONE_COLUMN,
    ),
    "hra_pair": MethodCase(
        "hra",
        reflections,
        lambda rows, columns: 2 * columns,
        {"rank": 2},
        "filters",
        impossible=ONE_COLUMN,
    ),
}
