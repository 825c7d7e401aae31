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
        bias_formula: from a bias as a column, what the method added and the frozen matrix, the
            effective bias.
        bias_count: from rows and columns of a matrix, the number of parameters for its bias.
        shared: from rows and columns of a matrix, the sizes of the parameters that it shares with
            others, by their names; they are not in `count`.
        whole: names of what has no axis of groups.
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
    bias_formula: Callable[[Tensor, Parameters, Tensor], Tensor] | None = None
    bias_count: Callable[[int, int], int] | None = None
    shared: Callable[[int, int], dict[str, int]] = lambda rows, columns: {}
    whole: tuple[str, ...] = ()
    impossible: dict[str, str] = field(default_factory=dict)
    differs: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def adapts_bias(self) -> bool:
        """Whether biases are adapted."""
        return self.scales_bias or self.bias_formula is not None

    def of_bias(self, bias: Tensor, p: Parameters, w0: Tensor) -> Tensor:
        """The effective bias of a frozen matrix, as a column."""
        if self.bias_formula is None:
            return self.formula(bias, p)
        return self.bias_formula(bias, p, w0)


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


def circulants(w0: Tensor, p: Parameters) -> Tensor:
    """Element by element: what output `o` gets from input `i`, a column count away."""
    (m, n, b), columns = p["c3a_w"].shape, w0.shape[1]
    o, i = torch.meshgrid(torch.arange(m * b), torch.arange(n * b), indexing="ij")
    return w0 + p["c3a_w"][o // b, i // b, (i % b - o % b) % b] / columns


def circulant_count(size: int | None = None) -> Callable[[int, int], int]:
    """Blocks as large as both sides allow, or as near to `size` as they allow."""

    def count(rows: int, columns: int) -> int:
        both = [n for n in range(1, rows + 1) if rows % n == 0 == columns % n]
        block = max(both) if size is None else min(both, key=lambda n: (abs(n - size), n))
        return rows * columns // block

    return count


def directions(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 + lambda / r sum_i (b_i / |b_i|) (a_i / |a_i|)^T diag(|W0 e_j|)``."""
    b, a = p["delora_B"], p["delora_A"]
    strength, rank = p["delora_lambda"], len(a)
    of_columns = w0.square().sum(0).sqrt()
    for i in range(rank):
        lengths = b[:, i].square().sum().sqrt() * a[i].square().sum().sqrt()
        w0 = w0 + strength / rank / lengths * torch.outer(b[:, i], a[i] * of_columns)
    return w0


def block_products(scaling: Callable[[int], float]) -> Formula:
    """Block `(j, n)` has ``B[j][:, n's ranks] A[n][j's ranks]``; `scaling` takes the rank."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        b, a = p["gralora_B"], p["gralora_A"]
        k, rank = len(b), b.shape[2]
        share = rank // k
        rows = []
        for j in range(k):
            blocks = [
                b[j][:, n * share : (n + 1) * share] @ a[n][j * share : (j + 1) * share]
                for n in range(k)
            ]
            rows.append(torch.cat(blocks, 1))
        return w0 + scaling(rank) * torch.cat(rows)

    return formula


def block_product_count(rank: int) -> Callable[[int, int], int]:
    """Two blocks along each side, if both are even; the rank is a multiple of that."""

    def count(rows: int, columns: int) -> int:
        k = 1 if rows % 2 or columns % 2 else 2
        return max(k, min(rank, rows, columns) // k * k) * (rows + columns)

    return count


def modulated(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 o (1 + B A)``."""
    return w0 * (1 + torch.einsum("oq,qi->oi", p["hira_B"], p["hira_A"]))


def shared_shard(w0: Tensor, p: Parameters) -> Tensor:
    """Input `i` has column ``i mod r`` of the shard."""
    d = p["miss_D"]
    return torch.stack([w0[:, i] + d[:, i % d.shape[1]] for i in range(w0.shape[1])], 1)


def rotated_pairs(variant: int, group: int = 64) -> Formula:
    """``R W0``, a pair of outputs after the other; a last one alone is scaled by its cosine."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        rows = len(w0) + len(w0) % 2
        sizes = [n for n in range(2, rows + 1, 2) if rows % n == 0]
        size = min(sizes, key=lambda n: (abs(n - group), n))
        half, theta, alpha = size // 2, p["road_theta"], p["road_alpha"]
        turn = torch.eye(rows, dtype=torch.float64)
        for start in range(0, rows, size):
            for i in range(half):
                pair = start + i, start + half + i
                for place, (own, other, sign) in enumerate(((*pair, -1), (*pair[::-1], 1))):
                    if variant == 1:
                        cosine = sine = start // 2 + i
                    elif variant == 2:
                        cosine = sine = own
                    else:
                        cosine = 2 * start + i + half * place
                        sine = cosine + size
                    row = torch.zeros(rows, dtype=torch.float64)
                    row = row.index_put(
                        (torch.tensor([own, other]),),
                        torch.stack([
                            alpha[cosine] * theta[cosine].cos(),
                            sign * alpha[sine] * theta[sine].sin(),
                        ]),
                    )  # fmt: skip
                    turn = torch.cat([turn[:own], row[None], turn[own + 1 :]])
        return turn[: len(w0), : len(w0)] @ w0

    return formula


def pair_count(entries: int) -> Callable[[int, int], int]:
    return lambda rows, columns: entries * (rows + rows % 2)


def added_whole(w0: Tensor, p: Parameters) -> Tensor:
    return w0 + p["full_delta"]


def mixed_directions(scaling: Callable[[int], float]) -> Formula:
    """``W0 + s U Sigma R V^T``; that U, Sigma and V are what they should be is told apart."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        scale = scaling(len(p["xs_R"]))
        return w0 + scale * torch.einsum("op,pq,qi->oi", p["xs_B"], p["xs_R"], p["xs_A"])

    return formula


def rotated_directions(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 + U Sigma (diag(beta) R diag(alpha) - I) V^T``, as for LoRA-XS."""
    rank = len(p["psoft_A"])
    turn = rotation(p["psoft_Q"], rank) if rank > 1 else torch.eye(1, dtype=torch.float64)
    beta, alpha = (p.get(f"psoft_{name}", torch.ones(rank).double()) for name in ("beta", "alpha"))
    moved = torch.einsum("p,pq,q->pq", beta, turn, alpha) - torch.eye(rank, dtype=torch.float64)
    return w0 + torch.einsum("op,pq,qi->oi", p["psoft_B"], moved, p["psoft_A"])


def rotated_count(rank: int, rescale: bool = True) -> Callable[[int, int], int]:
    def count(rows: int, columns: int) -> int:
        r = min(rank, rows, columns)
        return r * (r - 1) // 2 + 2 * r * rescale

    return count


def square_count(rank: int) -> Callable[[int, int], int]:
    return lambda rows, columns: min(rank, rows, columns) ** 2


def scaled_bases(scaling: float) -> Formula:
    """``W0 + s sum_j B_j Lambda_j A Gamma_j``, or its transpose for fewer rows than columns."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        a, b = p["randlora_A"], p["randlora_B"]
        update = torch.zeros(max(w0.shape), min(w0.shape), dtype=torch.float64)
        scales = p["randlora_lambda"], p["randlora_gamma"]
        for basis, of_rank, of_side in zip(b, *scales, strict=True):
            update = update + basis @ torch.diag(of_rank) @ a @ torch.diag(of_side)
        return w0 + scaling * (update if len(update) == len(w0) else update.T)

    return formula


def base_count(rank: int) -> Callable[[int, int], int]:
    return lambda rows, columns: -(-min(rows, columns) // rank) * (rank + min(rows, columns))


def haar(scaling: float) -> Formula:
    """Each coefficient adds half of itself to 2 x 2 elements, with the signs of its quarter."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        rows, columns = w0.shape
        height, width = -(-rows // 2), -(-columns // 2)
        update = torch.zeros(2 * height, 2 * width, dtype=torch.float64)
        step = torch.tensor([1.0, -1.0], dtype=torch.float64)
        for c, entry in zip(p["waveft_c"], p["waveft_E"].tolist(), strict=True):
            (of_rows, i), (of_columns, j) = (
                divmod(entry // columns, height), divmod(entry % columns, width)
            )  # fmt: skip
            # Coefficients on the right differ along rows of elements, those below along columns.
            signs = torch.outer(step**of_columns, step**of_rows)
            place = torch.zeros_like(update)
            place[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = signs / 2
            update = update + c * place
        return w0 + scaling * update[:rows, :columns]

    return formula


def pruned_triplets(scaling: Callable[[int], float]) -> Formula:
    """``W0 + s sum_i m_i lambda_i P_i Q_i``, one triplet after the other."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        values, mask = p["adalora_lambda"], p["adalora_mask"]
        for i, value in enumerate(values):
            triplet = torch.outer(p["adalora_P"][:, i], p["adalora_Q"][i])
            w0 = w0 + scaling(len(values)) * mask[i] * value * triplet
        return w0

    return formula


def triplet_count(rank: int) -> Callable[[int, int], int]:
    return lambda rows, columns: min(rank, rows, columns) * (rows + columns + 1)


def shifted(bias: Tensor, p: Parameters, w0: Tensor) -> Tensor:
    """``gamma b + beta``, output by output."""
    gamma, beta = p["ssf_gamma"].flatten(), p["ssf_beta"].flatten()
    return torch.stack([gamma[i] * b + beta[i] for i, b in enumerate(bias.flatten())])[:, None]


def support(name: str, p: Parameters, rows: int, columns: int) -> Tensor:
    """A support tensor of GLoRA, whole: of factors, a vector, or a number."""
    if f"glora_{name}_d" in p:
        return torch.einsum("oq,qi->oi", p[f"glora_{name}_d"], p[f"glora_{name}_u"])
    return p[f"glora_{name}"].expand(rows, columns)


def generalised(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 + W0 o A + B``."""
    return w0 * (1 + support("A", p, *w0.shape)) + support("B", p, *w0.shape)


def generalised_bias(bias: Tensor, p: Parameters, w0: Tensor) -> Tensor:
    """``b + b o D + E + W0 c``."""
    rows, columns = w0.shape
    if "glora_D" in p:
        bias = bias * (1 + support("D", p, rows, 1)) + support("E", p, rows, 1)
    if "glora_C" in p or "glora_C_d" in p:
        bias = bias + torch.einsum("oi,i->o", w0, support("C", p, columns, 1)[:, 0])[:, None]
    return bias


def slices_of_a_tensor(scaling: float) -> Formula:
    """``W0 + s U S V``, element by element."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        factors = p["fact_U"], p["fact_S"], p["fact_V"]
        return w0 + scaling * torch.einsum("op,pq,qi->oi", *factors)

    return formula


def tensor_sizes(rank: int) -> Callable[[int, int], dict[str, int]]:
    def sizes(rows: int, columns: int) -> dict[str, int]:
        r = min(rank, rows, columns)
        return {f"U {r} {rows}": r * rows, f"V {r} {columns}": r * columns}

    return sizes


def few_numbers(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 + U Sigma (sum_i v_i P_i) V^T``, as for LoRA-XS."""
    between = sum(v * one for v, one in zip(p["tiny_v"], p["tiny_P"], strict=True))
    return w0 + torch.einsum("op,pq,qi->oi", p["tiny_B"], between, p["tiny_A"])


def mixtures_of_a_bank(length: int, topk: int) -> Formula:
    """``W0 + c (B A - B0 A0)``, vector by vector of the bank; that the start is one is told apart.

    What is after the last element of a column of `B` or a row of `A` does not count.
    """

    def mixture(logits: Tensor, vectors: Tensor) -> Tensor:
        weights = logits.exp() / logits.exp().sum()
        return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))

    def trained(logits: Tensor, bank: Tensor) -> Tensor:
        largest = logits.detach().argsort(descending=True)[:topk]
        return mixture(logits[largest], bank[largest])

    def whole(pieces: list[Tensor], size: int) -> Tensor:
        assert 0 <= length * len(pieces) - size < length
        return torch.cat(pieces)[:size]

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        rows, columns = w0.shape
        bank, first = p["vblora_bank"], p["vblora_bank0"]
        b, a = p["vblora_logits_B"], p["vblora_logits_A"]
        b0, a0 = p["vblora_logits_B0"], p["vblora_logits_A0"]
        in_b, in_a = p["vblora_chosen_B0"], p["vblora_chosen_A0"]
        for q in range(len(a)):
            now = (
                whole([trained(z, bank) for z in b[:, q]], rows),
                whole([trained(z, bank) for z in a[q]], columns),
            )
            then = (
                whole([mixture(b0[i, q], first[in_b[i, q]]) for i in range(len(b))], rows),
                whole([mixture(a0[q, i], first[in_a[q, i]]) for i in range(a.shape[1])], columns),
            )
            w0 = w0 + p["vblora_c"] * (torch.outer(*now) - torch.outer(*then))
        return w0

    return formula


def logit_count(rank: int, vectors: int, length: int) -> Callable[[int, int], int]:
    def count(rows: int, columns: int) -> int:
        pieces = math.ceil(rows / length) + math.ceil(columns / length)
        return min(rank, rows, columns) * vectors * pieces

    return count


def projections_of_a_vector(w0: Tensor, p: Parameters) -> Tensor:
    """``W0 + c (B A - B0 A0)``, each entry a coordinate; which, and its scale, is told apart."""

    def factors(theta: Tensor) -> list[Tensor]:
        return [
            torch.stack([(theta * p["unilora_norm"])[where] for where in p[f"unilora_P_{key}"]])
            for key in ("B", "A")
        ]

    now, then = factors(p["unilora_theta"]), factors(p["unilora_theta0"])
    moved = torch.einsum("oq,qi->oi", *now) - torch.einsum("oq,qi->oi", *then)
    return w0 + p["unilora_c"] * moved


def rows_in_place(rows: list[int]) -> Formula:
    """Some rows have something added, all others are the frozen ones."""

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        trained = dict(zip(rows, p["tokens_T"], strict=True))
        return torch.stack(
            [row + trained.get(n, torch.zeros_like(row)) for n, row in enumerate(w0)]
        )

    return formula


def injected(scaling: Callable[[int], float], qr: bool = False) -> Formula:
    """``(I - Q T^T) W0 + Q R``; R starts at what is taken out of the weight."""

    def projection(p: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.linalg.qr(p)[0] if qr else p
        return first, first if qr else p.clamp_min(0)

    def formula(w0: Tensor, p: Parameters) -> Tensor:
        q, t = projection(p["deft_P"])
        start = projection(p["deft_P0"])[1].T @ w0
        r = start + scaling(len(p["deft_R"])) * p["deft_R"]
        return (torch.eye(len(w0), dtype=torch.float64) - q @ t.T) @ w0 + q @ r

    return formula


def injected_count(rank: int) -> Callable[[int, int], int]:
    return lambda rows, columns: min(rank, rows) * (rows + columns)


SIGN = {"gradients": "the direction of a single number is its sign, which does not move"}
# transformers' Conv1D and attention start with biases of zeros.
NO_BIAS = {"gradients": "a factor of a bias of zeros has no effect"}
ZERO_BIASES = dict.fromkeys(("transformers_conv1d", "attention"), NO_BIAS)
ONE_NUMBER = dict.fromkeys(("conv2d_depthwise", "norm_weight", "raw_vector"), SIGN)

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
    "trainable_tokens": MethodCase(
        "trainable_tokens", rows_in_place([0]), lambda rows, columns: columns, view="matrices"
    ),
    "guided": MethodCase(
        "guided", anchored_low_rank("guided", lambda rank: 1.0), low_rank_count(3)
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
    "c3a": MethodCase("c3a", circulants, circulant_count()),
    "c3a_small": MethodCase(
        "c3a", circulants, circulant_count(2), {"block_size": 2}
    ),
    "delora": MethodCase(
        "delora",
        directions,
        lambda rows, columns: low_rank_count(8)(rows, columns) + 1,
        view="outputs",
        differs=ONE_NUMBER,
    ),
    "delora_weak": MethodCase(
        "delora",
        directions,
        lambda rows, columns: low_rank_count(2)(rows, columns) + 1,
        {"rank": 2, "delora_lambda": 0.5, "clip_rank": True},
        "outputs",
        differs=ONE_NUMBER,
    ),
    "gralora": MethodCase("gralora", block_products(lambda rank: 1.0), block_product_count(4)),
    "gralora_scaled": MethodCase(
        "gralora",
        block_products(lambda rank: 5.0 / rank),
        block_product_count(2),
        {"rank": 2, "alpha": 5, "clip_rank": True},
    ),
    "hira": MethodCase("hira", modulated, low_rank_count(32), view="filters"),
    "hira_small": MethodCase(
        "hira", modulated, low_rank_count(2), {"rank": 2, "clip_rank": True}, "filters"
    ),
    "miss": MethodCase(
        "miss", shared_shard, lambda rows, columns: min(8, columns) * rows, view="filters"
    ),
    "miss_small": MethodCase(
        "miss",
        shared_shard,
        lambda rows, columns: min(2, columns) * rows,
        {"rank": 2, "clip_rank": True},
        "filters",
    ),
    "road": MethodCase(
        "road", rotated_pairs(1), pair_count(1), view="outputs", scales_bias=True
    ),
    "road_in_groups": MethodCase(
        "road", rotated_pairs(2, 4), pair_count(2), {"variant": "road_2", "group_size": 4},
        "outputs", scales_bias=True,
    ),
    "road_four": MethodCase(
        "road", rotated_pairs(4, 2), pair_count(4), {"variant": "road_4", "group_size": 2},
        "outputs", scales_bias=True,
    ),
    "deft": MethodCase(
        "deft", injected(lambda rank: 1.0), injected_count(8), view="filters"
    ),
    "deft_qr": MethodCase(
        "deft",
        injected(lambda rank: 5.0 / rank, qr=True),
        injected_count(2),
        {"rank": 2, "alpha": 5, "decomposition": "qr", "clip_rank": True},
        "filters",
        differs={"conv2d_depthwise": SIGN},
    ),
    "fact": MethodCase(
        "fact", slices_of_a_tensor(1.0), square_count(16), view="filters",
        shared=tensor_sizes(16), whole=("fact_U", "fact_V"),
    ),
    "fact_scaled": MethodCase(
        "fact",
        slices_of_a_tensor(0.5),
        square_count(2),
        {"rank": 2, "scaling": 0.5, "clip_rank": True},
        "filters",
        shared=tensor_sizes(2),
        whole=("fact_U", "fact_V"),
    ),
    "tinylora": MethodCase(
        "tinylora",
        few_numbers,
        lambda rows, columns: 0,
        view="filters",
        shared=lambda rows, columns: {"v": 64},
        whole=("tiny_v", "tiny_P"),
    ),
    "tinylora_apart": MethodCase(
        "tinylora",
        few_numbers,
        lambda rows, columns: 5,
        {"rank": 3, "u": 5, "tied": False, "seed": 1, "clip_rank": True},
        "filters",
        whole=("tiny_P",),
    ),
    "vblora": MethodCase(
        "vblora",
        mixtures_of_a_bank(256, 2),
        logit_count(4, 90, 256),
        shared=lambda rows, columns: {"bank": 90 * 256},
        whole=("vblora_bank", "vblora_bank0", "vblora_c"),
    ),
    "vblora_short": MethodCase(
        "vblora",
        mixtures_of_a_bank(3, 4),
        logit_count(2, 7, 3),
        {
            **{"rank": 2, "num_vectors": 7, "vector_length": 3, "topk": 4, "seed": 2},
            **{"init_vector_bank_bound": 0.5, "init_logits_std": 2.0, "clip_rank": True},
        },
        shared=lambda rows, columns: {"bank": 7 * 3},
        whole=("vblora_bank", "vblora_bank0", "vblora_c"),
    ),
    "unilora": MethodCase(
        "unilora",
        projections_of_a_vector,
        lambda rows, columns: 0,
        shared=lambda rows, columns: {"theta": 23_040},
        whole=("unilora_theta", "unilora_theta0", "unilora_norm", "unilora_c"),
    ),
    "unilora_short": MethodCase(
        "unilora",
        projections_of_a_vector,
        lambda rows, columns: 0,
        {
            **{"rank": 2, "theta_d_length": 11, "init_theta_d_bound": 0.5, "seed": 3},
            **{"clip_rank": True},
        },
        shared=lambda rows, columns: {"theta": 11},
        whole=("unilora_theta", "unilora_theta0", "unilora_norm", "unilora_c"),
    ),
    "ssf": MethodCase(
        "ssf",
        lambda w0, p: torch.diag(p["ssf_gamma"].flatten()) @ w0,
        lambda rows, columns: rows,
        view="outputs",
        bias_formula=shifted,
        bias_count=lambda rows, columns: rows,
    ),
    "glora": MethodCase(
        "glora",
        generalised,
        lambda rows, columns: 2 * low_rank_count(8)(rows, columns),
        view="outputs",
        differs=ZERO_BIASES,
        bias_formula=generalised_bias,
        bias_count=lambda rows, columns: min(8, rows, columns) * (columns + 1) + 2,
    ),
    "glora_vectors": MethodCase(
        "glora",
        generalised,
        lambda rows, columns: 2 * rows,
        {"a_b": "vector", "c": "vector", "d_e": "vector"},
        "outputs",
        differs=ZERO_BIASES,
        bias_formula=generalised_bias,
        bias_count=lambda rows, columns: columns + 2 * rows,
    ),
    "glora_numbers": MethodCase(
        "glora",
        generalised,
        lambda rows, columns: 2,
        {"a_b": "constant", "c": "none"},
        "outputs",
        differs=ZERO_BIASES,
        bias_formula=generalised_bias,
        bias_count=lambda rows, columns: 2,
    ),
    "full_delta": MethodCase(
        "full_delta", added_whole, lambda rows, columns: rows * columns, view="filters"
    ),
    "lora_xs": MethodCase(
        "lora_xs", mixed_directions(lambda rank: 1.0), square_count(8), view="filters"
    ),
    "lora_xs_scaled": MethodCase(
        "lora_xs",
        mixed_directions(lambda rank: 5.0 / rank),
        square_count(2),
        {"rank": 2, "alpha": 5, "clip_rank": True},
        "filters",
    ),
    "randlora": MethodCase(
        "randlora", scaled_bases(0.5), base_count(32), {"alpha": 16}, "filters"
    ),
    "randlora_small": MethodCase(
        "randlora",
        scaled_bases(1.5),
        base_count(2),
        {"rank": 2, "alpha": 3, "seed": 4},
        "filters",
    ),
    "psoft": MethodCase("psoft", rotated_directions, rotated_count(32), view="filters"),
    "psoft_plain": MethodCase(
        "psoft",
        rotated_directions,
        rotated_count(32, rescale=False),
        {"rescale": False},
        "filters",
        impossible=dict.fromkeys(
            ("conv2d_depthwise", "norm_weight", "raw_vector"), "one singular direction has nothing"
        ),
    ),
    "adalora": MethodCase(
        "adalora", pruned_triplets(lambda rank: 1.0), triplet_count(12), view="filters"
    ),
    "adalora_scaled": MethodCase(
        "adalora",
        pruned_triplets(lambda rank: 5.0 / rank),
        triplet_count(2),
        {"rank": 2, "alpha": 5, "clip_rank": True},
        "filters",
    ),
    "waveft": MethodCase(
        "waveft", haar(0.5), lambda rows, columns: min(2592, rows * columns), {"scaling": 0.5}
    ),
    "waveft_few": MethodCase(
        "waveft",
        haar(2.0),
        lambda rows, columns: 5,
        {"n_frequency": 5, "scaling": 2.0, "seed": 3},
    ),
}  # fmt: skip
