"""LoKr: a Kronecker product with a low-rank factor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.conv_layers import conv_forwards, effective_conv, is_usual, low_rank_conv
from gift.kernels.kronecker_linear import KroneckerLinear
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.operands import operands
from gift.methods.base import ScaledMethod, register_method
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import flag, is_integer, setting


def _is_factor(value: Any) -> bool:
    return is_integer(value) and (value == -1 or value > 0)


@register_method
@dataclass(frozen=True)
class LoKr(ScaledMethod):
    r"""Low-rank Kronecker product (LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859).

    .. math:: W' = W_0 + \frac{\alpha}{r} w_1 \otimes (w_{2a} w_{2b})

    The rows of a matrix are split into ``a * b`` and its columns into ``c * d`` by `factorization`.
    It adds ``lokr_w1 (a, c)``, ``lokr_w2_a (b, r)`` and ``lokr_w2_b (r, d)``, for each group of a
    weight with groups: ``a c + r (b + d)`` parameters. With `decompose_both`, ``lokr_w1_a (a, q)``
    and ``lokr_w1_b (q, c)`` with ``q = min(r, a, c)`` replace `w1`: ``(a + c) q + r (b + d)``
    parameters. With `full_matrix`, ``lokr_w2 (b, d)`` replaces the other two, and the scaling is 1:
    ``a c + b d`` parameters. The last factor (``lokr_w2_b`` or ``lokr_w2``) starts at zero, so that
    the product is zero. The others are drawn like the weight of a linear layer, as in LyCORIS.

    LyCORIS decides for each layer which factors to decompose. Here the settings decide for all
    layers. LyCORIS splits the channels of a convolution. Here its columns (channels and kernel) are
    split as a whole, which is the same for a small `factor` that divides the channels.

    Args:
        rank: `r`, up to the smaller of `b` and `d`. None means 3, or less for a smaller matrix.
        alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        factor: the smaller part of a split, or an upper bound of it where it is not a divisor. -1
            splits as evenly as possible.
        column_factor: the same for the columns; None means `factor`.
        decompose_both: whether `w1` is a product of two factors too.
        full_matrix: whether `w2` is one matrix, without a rank.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.

    Raises:
        ValueError: if settings are out of range, or if `full_matrix` comes with a rank, alpha or
            `decompose_both`, which would have no effect.
    """

    name: ClassVar[str] = "lokr"
    strategy_prefix: ClassVar[str] = "LoKr"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h", "balanced")

    factor: int = setting(-1, "-1 or an integer of at least 1", _is_factor)
    decompose_both: bool = flag()
    full_matrix: bool = flag()
    column_factor: int | None = setting(
        None, "-1 or an integer of at least 1", _is_factor, kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        useless = {"rank": self.rank, "alpha": self.alpha, "decompose_both": self.decompose_both}
        given = [key for key, value in useless.items() if value is not None and value is not False]
        if self.full_matrix and given:
            raise ValueError(f"LoKr: full_matrix leaves nothing for {', '.join(given)} to do")
        if self.full_matrix:  # then no setting determines its size
            object.__setattr__(self, "size_setting", None)

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """Return the smaller side of `w2`."""
        return min(self._split(shape)[1])

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its rank settled, if it has one."""
        return self if self.full_matrix else super().fit(shape)

    def _split(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes ``(a, c)`` and ``(b, d)`` of `w1` and `w2`."""
        rows, columns = shape[-2:]
        of_columns = self.factor if self.column_factor is None else self.column_factor
        (a, b), (c, d) = factorization(rows, self.factor), factorization(columns, of_columns)
        return (a, c), (b, d)

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zeros for the last factor of `w2`, and the others drawn as in ``nn.Linear``."""
        groups, like = matrix.shape[:-2], self.factory_kwargs(matrix)
        (a, c), (b, d) = self._split(matrix.shape)
        if self.full_matrix:
            return {
                "lokr_w1": kaiming_uniform(*groups, a, c, **like),
                "lokr_w2": torch.zeros(*groups, b, d, **like),
            }
        assert self.rank is not None
        q = min(self.rank, a, c)
        first = {"lokr_w1": (a, c)}
        if self.decompose_both:
            first = {"lokr_w1_a": (a, q), "lokr_w1_b": (q, c)}
        return {key: kaiming_uniform(*groups, *shape, **like) for key, shape in first.items()} | {
            "lokr_w2_a": kaiming_uniform(*groups, b, self.rank, **like),
            "lokr_w2_b": torch.zeros(*groups, self.rank, d, **like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + s w1 (x) w2``."""
        w1, w2 = self._w1(parameters), parameters.get("lokr_w2")
        if w2 is None:
            w2 = parameters["lokr_w2_a"] @ parameters["lokr_w2_b"]
        product = w1[..., :, None, :, None] * w2[..., None, :, None, :]  # (..., a, b, c, d)
        return matrix + product.reshape(matrix.shape)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the last factor of `w2`, or `w2` itself, by the number."""
        last = "lokr_w2" if "lokr_w2" in parameters else "lokr_w2_b"
        return {**parameters, last: parameters[last] * number}

    def _w1(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return `w1` times the scaling."""
        w1 = parameters.get("lokr_w1")
        if w1 is None:
            w1 = parameters["lokr_w1_a"] @ parameters["lokr_w1_b"]
        return w1 if self.scaling == 1 else w1 * self.scaling


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return two integers whose product is `size`, the smaller one first.

    Args:
        size: the number to split.
        factor: one of the two, if it is a divisor of `size`. Otherwise the smaller one is the
            largest divisor up to `factor` and up to the root of `size`; -1 sets no bound.

    Example:
        >>> [factorization(360, factor) for factor in (-1, 4, 7)]
        [(18, 20), (4, 90), (6, 60)]
    """
    if factor > 0 and size % factor == 0:
        smaller = min(factor, size // factor)
    else:
        most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
        smaller = next(n for n in range(most, 0, -1) if size % n == 0)
    return smaller, size // smaller


def _linear(
    method: LoKr,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 x + bias + s w1 X w2^T`` with the features of `x` as a matrix ``X (c, d)``.

    The rank is the smallest size, so `w1` acts between the two factors of `w2`.
    """
    w1, left = method._w1(parameters), parameters.get("lokr_w2_a")
    right = parameters["lokr_w2" if left is None else "lokr_w2_b"]
    alike = None
    if type(product) is Product:
        alike = operands(x, product.matrix, bias, w1, left, right)
    if alike is not None:
        fast: Tensor = KroneckerLinear.apply(*alike, product.ways)
        return fast
    output = product.output(x, bias)
    side = F.linear(x.to(w1.dtype).unflatten(-1, (w1.shape[1], -1)), right)  # (..., c, r)
    side = F.linear(side.transpose(-1, -2), w1).transpose(-1, -2)  # (..., a, r)
    if left is not None:
        side = F.linear(side, left)  # (..., a, b)
    return (output + side.flatten(-2)).to(output.dtype)


def _conv(self: Any, input: Tensor) -> Tensor:
    """Use LoRA's path with a matrix whose rows are pieces of the weight's, `c` for each output.

    Each piece of ``w1 (x) left right`` is a number of `w1` times a row of ``left right``. Each
    piece has its own filters, and moving from one to the next takes longer than applying them. So
    this pays off only where few positions meet a large weight.
    """
    delta = self._gift_weights["weight"]
    method, parameters = delta.delta_of(self)
    few = input.numel() < self.in_channels * self.out_channels
    if is_usual(self) and self.groups == 1 and few and not method.full_matrix:
        w1, right = method._w1(parameters), parameters["lokr_w2_b"]
        left = torch.kron(w1, parameters["lokr_w2_a"])  # (rows, c * r)
        output = low_rank_conv(self, input, (left.reshape(-1, len(right)), right), None, None)
        if output is not None:
            return output
    return effective_conv(self, input)


LoKr.forwards = linear_forwards(_linear) | conv_forwards(_conv)
