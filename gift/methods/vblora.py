"""VB-LoRA: factors that are put together from one bank of vectors for the whole network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gift.methods.anchored import AnchoredMethod, Factors
from gift.methods.base import register_method, with_settings
from gift.methods.draws import seeded_buffer, uniform
from gift.methods.settings import at_least_32_bits, positive, whole


@register_method
@dataclass(frozen=True)
class VBLoRA(AnchoredMethod):
    r"""Vector bank LoRA (Li et al. 2024, https://arxiv.org/abs/2405.15179).

    .. math:: W' = W_0 + B A - B_0 A_0, \quad u = \sum_{j \in T} w_j v_j, \quad
        w = \operatorname{softmax}((z_j)_{j \in T}), \quad T = \operatorname{top}_k(z)

    Each column of `B` and each row of `A` is a sequence of sub-vectors `u` of length `b`, and each
    sub-vector is a mixture of `k` of the `h` vectors :math:`v_j` of one bank. The last sub-vector
    is cut where `b` does not divide the length. All matrices of the network share
    ``vblora_bank (h, b)``, uniform in ``±init_vector_bank_bound``. For a matrix ``(rows,
    columns)`` it adds the logits `z`: ``vblora_logits_B (ceil(rows / b), r, h)`` and
    ``vblora_logits_A (r, ceil(columns / b), h)``, normal with deviation `init_logits_std`. That is
    ``r h (ceil(rows / b) + ceil(columns / b))`` parameters, for each group of a weight with groups,
    and ``h b`` for the network.

    The paper starts at :math:`W_0 + B_0 A_0`. Here the product at the start is subtracted, see
    `gift.methods.anchored`. The bank at the start is drawn from the seed and never saved. For each
    sub-vector the `k` vectors of the start, ``vblora_chosen_B0`` and ``vblora_chosen_A0``, and
    their logits, ``vblora_logits_B0`` and ``vblora_logits_A0``, are saved with the delta. Logits
    start at values that bfloat16 can hold, and the first of equal logits counts as the larger one,
    so that no device or dtype chooses other vectors.

    Args:
        rank: `r`. None means 4, or less for a smaller matrix.
        num_vectors: `h`.
        vector_length: `b`.
        topk: `k`, at most `h`. It is at least two, as the logit of a single vector has no effect.
        init_vector_bank_bound: bound of the bank at the start.
        init_logits_std: deviation of the logits at the start.
        seed: seed of the bank.
        rows: rows of the matrix, which need not be given, as its shape determines them.
        columns: columns of the matrix, likewise.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of bank and logits, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "vblora"
    strategy_prefix: ClassVar[str] = "VBLoRA"
    shared: ClassVar[tuple[str, ...]] = ("vblora_bank",)
    default_rank: ClassVar[int] = 4

    num_vectors: int = whole(90, least=2)
    vector_length: int = whole(256)
    topk: int = whole(2, least=2)
    init_vector_bank_bound: float = positive(0.02)
    init_logits_std: float = positive(0.1, enters_weight=False)
    seed: int = whole(0, least=0)
    rows: int | None = whole(None, enters_weight=False, kw_only=True, found=True)
    columns: int | None = whole(None, enters_weight=False, kw_only=True, found=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(
                f"VBLoRA: topk is {self.topk}, expected at most num_vectors, {self.num_vectors}"
            )

    @property
    def shares_with(self) -> tuple[Any, ...]:
        """What determines the bank at the start."""
        return self.seed, self.init_vector_bank_bound

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its rank settled for a matrix of known sides."""
        rows, columns = shape[-2:]
        settled: Self = with_settings(super().fit(shape), rows=rows, columns=columns)
        return settled

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return random logits, the bank, and what describes the start."""
        *groups, rows, columns = matrix.shape
        like = self.factory_kwargs(matrix)
        shape = self.num_vectors, self.vector_length
        bank = seeded_buffer(uniform, self.seed, shape, self.init_vector_bank_bound, **like)
        real = like | {"dtype": like["dtype"].to_real()}
        of_rows, of_columns = (-(-size // self.vector_length) for size in (rows, columns))
        logits = {
            "B": self._logits(*groups, of_rows, self.rank, **real),
            "A": self._logits(*groups, self.rank, of_columns, **real),
        }
        made = {f"vblora_logits_{key}": value for key, value in logits.items()}
        made |= {"vblora_bank": bank.detach().clone(), "vblora_bank0": bank}
        for key, value in logits.items():
            chosen = _largest(value, self.topk)
            made[f"vblora_chosen_{key}0"] = nn.Buffer(chosen)
            made[f"vblora_logits_{key}0"] = nn.Buffer(value.gather(-1, chosen))
        return made | self.multiplier(matrix)

    def _logits(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Draw logits for sub-vectors."""
        drawn = torch.randn(*shape, self.num_vectors, device=device) * self.init_logits_std
        return drawn.bfloat16().to(dtype)

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return `B` and `A`."""
        mixed = {}
        for key in ("B", "A"):
            logits = parameters[f"vblora_logits_{key}"]
            chosen = _largest(logits, self.topk)
            mixed[key] = _mixed(logits.gather(-1, chosen), chosen, parameters["vblora_bank"])
        return self._joined(**mixed)

    def anchors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return ``B0`` and ``A0``, of the bank and the choice at the start."""
        mixed = {}
        for key in ("B", "A"):
            logits, chosen = (parameters[f"vblora_{name}_{key}0"] for name in ("logits", "chosen"))
            mixed[key] = _mixed(logits, chosen, parameters["vblora_bank0"])
        return self._joined(**mixed)

    def _joined(self, B: Tensor, A: Tensor) -> Factors:
        """Join sub-vectors, ``(pieces, r, b)`` and ``(r, pieces, b)``, to the factors."""
        left = B.transpose(-1, -2).flatten(-3, -2)
        return left[..., : self.rows, :], A.flatten(-2)[..., : self.columns]


def _largest(logits: Tensor, count: int) -> Tensor:
    """Return the places of the largest logits; ``topk`` would choose among equal ones at will."""
    left, found = logits.detach(), []
    for _ in range(count):
        place = left.max(-1, keepdim=True).indices  # the first of equal ones
        found.append(place)
        left = left.scatter(-1, place, -math.inf)
    return torch.cat(found, -1)


def _mixed(logits: Tensor, chosen: Tensor, bank: Tensor) -> Tensor:
    """Return sub-vectors ``(..., b)``: means of the chosen vectors, in at least 32 bits."""
    weights = logits.to(at_least_32_bits(logits.dtype)).softmax(-1)
    return (weights.unsqueeze(-1) * bank[chosen]).sum(-2)
