"""DoRA: separate magnitude and direction of each output."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.kernels.conv_layers import conv_forwards, effective_conv, is_usual, low_rank_conv
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import low_rank_product
from gift.kernels.operands import dropped_inputs
from gift.kernels.products import scaled
from gift.kernels.rescale import finite, rescaled
from gift.methods.base import Method, register_method
from gift.methods.lora import LoRA
from gift.methods.settings import flag


@register_method
@dataclass(frozen=True)
class DoRA(LoRA):
    r"""Weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    .. math:: W' = m \frac{V}{\|V\|_c}, \quad V = W_0 + \frac{\alpha}{r} B A,
        \quad m = \|W_0\|_c + \Delta m

    The norm is taken over the weights of each output feature, a row here. For a matrix ``(rows,
    columns)`` it adds LoRA's ``lora_B (rows, r)`` and ``lora_A (r, columns)``, and ``dora_delta_m
    (rows, 1)``, the difference of the magnitude `m` from that of the frozen weight. ``B`` and
    ``delta_m`` start at zero. That is ``r * (rows + columns) + rows`` parameters.

    The norm needs neither a forward pass nor a second weight. Its square for each row is the sum of
    squares of the row of ``W0`` (``dora_squares``, never saved) plus ``2 s <W0 A^T, B> + s^2 B A
    A^T B^T``. A row of zeros has no direction. Neither has a row with an infinite norm, whether its
    values are infinite or their squares overflow. Such rows are trained as in LoRA, without a
    magnitude.

    Args:
        detach_norm: treat the norm of ``V`` as a constant in the gradient, as the paper proposes in
            its section 4.3 and as other implementations do; False gives the full gradient.
        rank: as in `LoRA`, like all other arguments.
    """

    name: ClassVar[str] = "dora"
    strategy_prefix: ClassVar[str] = "DoRA"
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    derives: ClassVar[tuple[str, ...]] = ("dora_squares",)
    split_axes = {**LoRA.split_axes, "dora_delta_m": (0, None), "dora_squares": (0, None)}
    split_by = ("rows",)  # a norm needs all columns

    detach_norm: bool = flag(True, enters_weight=False)

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return LoRA's factors, and a zero difference of magnitudes."""
        (squares,) = self.derived(matrix).values()
        return super().init_parameters(matrix) | {
            "dora_delta_m": torch.zeros_like(squares, dtype=self.delta_dtype(matrix).to_real()),
            "dora_squares": nn.Buffer(squares, persistent=False),
        }

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the sum of squares of each row."""
        precise = matrix.to(self.working_dtype(matrix))
        return {"dora_squares": precise.abs().square().sum(-1, keepdim=True)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``m V / |V|``."""
        ratio = self.ratio(matrix, parameters)
        factors = {**parameters, "lora_A": parameters.get("dropped_A", parameters["lora_A"])}
        return ratio * super().effective_weight(matrix, factors)

    def low_rank(self, parameters: Mapping[str, Tensor]) -> None:
        """Return None: the norms of the rows make the update depend on the matrix."""

    def scaled_low_rank(self, parameters: Mapping[str, Tensor]) -> None:
        """Return None, as `low_rank` does."""

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Raise, since no parameters give a multiple of the delta."""
        return Method.multiplied(self, parameters, number)

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop input features of the update, but not in its norm."""
        return {**parameters, "dropped_A": super().drop(parameters, input_axis)["lora_A"]}

    def ratio(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``m / |V|`` for each row; one where the frozen row has no direction."""
        directed, seen = self.directed(parameters), parameters
        if self.detach_norm:
            # Not by torch.no_grad: forward-mode differentiation continues within it, and autocast
            # of older versions of torch caches its casts within it, without a graph, for later use.
            matrix, seen = matrix.detach(), {k: v.detach() for k, v in parameters.items()}
        norm = (seen["dora_squares"] + self._growth(matrix, seen)).clamp_min(0).sqrt()
        ratio = self.magnitude(parameters) / torch.where(norm == 0, 1, norm)
        return torch.where(directed, ratio, 1)

    def directed(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Whether each frozen row has a direction: its norm is finite and not zero."""
        squares = parameters["dora_squares"]
        return (squares > 0) & (squares < math.inf)

    def magnitude(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return `m` for each row; it is meaningless where the frozen row has no direction."""
        return parameters["dora_squares"].sqrt() + parameters["dora_delta_m"]

    def _growth(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return by how much the rows' squared norms grow from ``W0`` to ``V``: zero where B is."""
        b, a = scaled(parameters["lora_B"], self.scaling), parameters["lora_A"]
        crossed = 2 * (matrix @ a.mH) + b @ (a @ a.mH)
        return (crossed * b.conj()).sum(-1, keepdim=True).real


def _trained(parameters: Mapping[str, Tensor], bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what the ratio depends on, but for the matrix and its norms, and the bias."""
    return parameters["lora_B"], parameters["lora_A"], parameters["dora_delta_m"], bias


def _linear(
    method: DoRA,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``ratio o (W0 x + s B A dropout(x)) + bias``, the rescaled output of LoRA."""
    left, right = parameters["lora_B"], parameters["lora_A"]
    dropped = dropped_inputs(method, x, training)

    def scales() -> "tuple[Tensor, Tensor | None]":
        return finite(method.ratio(product.matrix.to(right.dtype), parameters), bias)

    # Annotations are quoted, since the compiler of torch 2.6 cannot evaluate unions.
    def lora(
        x: Tensor, bias: "Tensor | None", left: Tensor, right: Tensor, dropped: "Tensor | None"
    ) -> Tensor:
        factors = (left, right)
        return low_rank_product(x, product, bias, factors, dropped, method.scaling, method.form)

    trained = _trained(parameters, bias)
    ratio, centre = product.remembered.get(scales, method, product.weight, trained)
    inputs = (x, bias, left, right, dropped)
    return rescaled(lora(*inputs), ratio, centre, lora, inputs, ways=product.ways)


def _conv(self: Any, input: Tensor) -> Tensor:
    """The same for convolutions of one group; otherwise use the effective weight, as LoRA does."""
    delta = self._gift_weights["weight"]
    method, parameters = delta.delta_of(self)

    def lora(x: Tensor, left: Tensor, right: Tensor, dropped: "Tensor | None") -> Any:  # quoted too
        return low_rank_conv(self, x, (left, right), dropped, method.form, method.scaling)

    if is_usual(self) and self.groups == 1:
        dropped = dropped_inputs(method, input, self.training)
        inputs = (input, parameters["lora_B"], parameters["lora_A"], dropped)
        output = lora(*inputs)
        if output is not None:
            frozen, channel = self._gift_frozen("weight"), -1 - len(self.kernel_size)

            def scales() -> "tuple[Tensor, Tensor | None]":
                matrix = delta.layout.to_matrix(frozen).to(parameters["lora_A"].dtype)
                return finite(method.ratio(matrix, parameters), self.bias, channel)

            trained = _trained(parameters, self.bias)
            ratio, bias = delta.remembered.get(scales, method, frozen, trained)
            return rescaled(output, ratio, bias, lora, inputs, channel, delta.ways)
    return effective_conv(self, input)


DoRA.forwards = linear_forwards(_linear) | conv_forwards(_conv)
