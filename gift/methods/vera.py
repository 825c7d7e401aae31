"""VeRA: two vectors that scale random matrices shared by all layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import linear, low_rank_forwards
from gift.kernels.merged_linear import terms, through_weight
from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import seeded_buffer
from gift.methods.settings import flag, number, probability, whole


@register_method
@dataclass(frozen=True)
class VeRA(RankedMethod):
    r"""Vector-based random matrix adaptation (Kopiczko et al. 2023,
    https://arxiv.org/abs/2310.11454).

    .. math:: W' = W_0 + \operatorname{diag}(b) \, B \operatorname{diag}(d) \, A

    For a matrix ``(rows, columns)`` it adds ``vera_b (rows,)``, which starts at zero, so that the
    update is zero, and ``vera_d (r,)``, which starts at `d_initial`. That is ``rows + r``
    parameters, for each group of a weight with groups. The buffers ``vera_A (r, columns)`` and
    ``vera_B (rows, r)`` are frozen and drawn from the seed. They are not saved by default.

    Each layer takes the leading part of one infinite pair, so the size of the largest layer need
    not be known in advance. That part is scaled to the bounds of Kaiming's uniform distribution,
    ``±sqrt(6/columns)`` and ``±sqrt(6/r)``. Layers that need the same matrix share its memory, and
    the groups of a weight have equal ones. PEFT draws another pair from the same seed, so its
    adapters are read with `save_projection`. Then each layer has its own pair, which may hold any
    values and is saved with the delta.

    Args:
        rank: `r`. It may exceed both rows and columns, up to ``rows * columns``: terms beyond that
            add nothing. None means 256, or less for a smaller matrix.
        d_initial: initial value of `d`.
        vera_dropout: probability with which an input of the delta is dropped while training. Where
            the layer reads its weight itself, one mask over the columns serves the whole batch.
        seed: seed of the random pair.
        save_projection: whether to save the pair with the delta, ``r * (rows + columns)`` numbers
            that are not trained.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of vectors and matrices, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "vera"
    strategy_prefix: ClassVar[str] = "VeRA"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True
    default_rank: ClassVar[int] = 256
    split_axes = {
        **{"vera_b": (0, None), "vera_d": (None, None)},
        **{"vera_B": (0, None), "vera_A": (None, 1)},
    }

    d_initial: float = number(0.1, enters_weight=False)
    vera_dropout: float = probability()
    seed: int = whole(0, least=0)
    save_projection: bool = flag()

    @property
    def dropout(self) -> float:  # type: ignore[override]
        """The dropout probability for `drop`."""
        return self.vera_dropout

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """Return the number of elements of the matrix."""
        return math.prod(shape[-2:])

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero `b`, a constant `d`, and the frozen pair."""
        assert self.rank is not None
        *groups, rows, columns = matrix.shape
        like = self.factory_kwargs(matrix)
        a, b = (*groups, self.rank, columns), (*groups, rows, self.rank)
        pair = {
            "vera_A": seeded_buffer(_draw_a, self.seed, a, **like),
            "vera_B": seeded_buffer(_draw_b, self.seed, b, **like),
        }
        if self.save_projection:
            pair = {name: nn.Buffer(drawn.detach().clone()) for name, drawn in pair.items()}
        return {
            "vera_b": torch.zeros(*groups, rows, **like),
            "vera_d": torch.full((*groups, self.rank), self.d_initial, **like),
            **pair,
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + diag(b) B diag(d) A``."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``diag(b) B diag(d)`` and ``A``, which needs no gradient."""
        scales = parameters["vera_b"].unsqueeze(-1) * parameters["vera_d"].unsqueeze(-2)
        return parameters["vera_B"] * scales, parameters["vera_A"]

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `b` by the number."""
        return {**parameters, "vera_b": parameters["vera_b"] * number}

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop columns of ``A``: rows are outputs in every layer."""
        a = parameters["vera_A"]
        mask = F.dropout(a.new_ones(a.shape[-1]), self.vera_dropout)
        return {**parameters, "vera_A": a * mask}


def _draw_a(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draw the left half of the pair, transposed: a column of `A` is a row of the pair."""
    *_, rank, columns = shape
    return _scaled(_pair(generator, columns, rank)[:, :rank].T, shape)


def _draw_b(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draw the right half of the pair."""
    *_, rows, rank = shape
    return _scaled(_pair(generator, rows, rank)[:, rank:], shape)


def _pair(generator: torch.Generator, length: int, rank: int) -> Tensor:
    """Draw the first rows of an infinite matrix, uniform in [0, 1): rows are drawn one by one."""
    return torch.rand(length, 2 * rank, generator=generator, dtype=torch.float32, device="cpu")


def _scaled(draws: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scale the draws to Kaiming's bounds, for each group."""
    return ((2 * draws - 1) * math.sqrt(6 / shape[-1])).expand(shape).contiguous()


def _linear(
    method: VeRA,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Use the factors, or the effective weight if that is cheaper."""
    delta = terms(x, len(parameters["vera_b"]), len(parameters["vera_d"]))
    beside = delta.go_beside(torch.is_grad_enabled(), both=False)
    # Merging rounds to 16 bits at the magnitude of the weight, which would lose small deltas.
    if beside or x.dtype.itemsize < 4 or (method.vera_dropout and training):
        return linear(method, parameters, x, product, bias, training)
    return through_weight(method, parameters, x, product, bias)


VeRA.forwards = low_rank_forwards() | linear_forwards(_linear)
