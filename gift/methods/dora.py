"""DoRA: magnitude and direction of each output apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.fast.linear import Product, linear_forwards
from gift.fast.low_rank import (
    CONVOLUTIONS,
    dropped_inputs,
    is_usual,
    low_rank_conv,
    low_rank_product,
)
from gift.fast.products import scaled
from gift.fast.rescale import rescaled
from gift.methods.base import Method, dotted, register_method
from gift.methods.lora import LoRA
from gift.methods.settings import flag
from gift.private.torch import convolve


@register_method
@dataclass(frozen=True)
class DoRA(LoRA):
    r"""Weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    .. math:: W' = m \frac{V}{\|V\|_c}, \quad V = W_0 + \frac{\alpha}{r} B A,
        \quad m = \|W_0\|_c + \Delta m

    The norm is that of the weights of each output feature, a row here. For a matrix ``(rows,
    columns)`` it adds LoRA's ``lora_B (rows, r)`` and ``lora_A (r, columns)``, and ``dora_delta_m
    (rows, 1)``, by which the magnitude `m` differs from that of the frozen weight; ``B`` and
    ``delta_m`` start at zero. That is ``r * (rows + columns) + rows`` parameters.

    The norm costs no forward pass and no second weight: with the squares of ``W0`` at hand
    (``dora_squares``, never saved), its square is theirs plus ``2 s <W0 A^T, B> + s^2 B A A^T B^T``
    for each row. A row of zeros has no direction, nor has one whose norm is infinite, by its
    values or since their squares overflow; it is trained as LoRA does, without magnitude.

    Args:
        detach_norm: treat the norm of ``V`` as a constant in the gradient, as the paper proposes in
            its section 4.3 and as other implementations do; False gives the full gradient.
        rank: as in `LoRA`, like all other arguments.
    """

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    derives: ClassVar[tuple[str, ...]] = ("dora_squares",)

    detach_norm: bool = flag(True, enters_weight=False)

    def init(self, matrix: Tensor) -> dict[str, Tensor]:
        """LoRA's factors, and no difference of magnitudes."""
        (squares,) = self.derived(matrix).values()
        return super().init(matrix) | {
            "dora_delta_m": torch.zeros_like(squares, dtype=self.delta_dtype(matrix).to_real()),
            "dora_squares": nn.Buffer(squares, persistent=False),
        }

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """The squares of its rows."""
        precise = matrix.to(self.working_dtype(matrix))
        return {"dora_squares": precise.abs().square().sum(-1, keepdim=True)}

    def weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """``m V / |V|``."""
        ratio = self.ratio(matrix, parameters)
        factors = {**parameters, "lora_A": parameters.get("dropped_A", parameters["lora_A"])}
        return ratio * super().weight(matrix, factors)

    def low_rank(self, parameters: Mapping[str, Tensor]) -> None:
        """None: the norms of the rows take part."""

    def scaled_low_rank(self, parameters: Mapping[str, Tensor]) -> None:
        """None, likewise."""

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Refused, as there is none."""
        return Method.multiplied(self, parameters, number)

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop input features of the update, but not in its norm."""
        return {**parameters, "dropped_A": super().drop(parameters, input_axis)["lora_A"]}

    def ratio(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """``m / |V|`` for each row; one where the frozen row has no direction."""
        directed, seen = self.directed(parameters), parameters
        if self.detach_norm:
            # Not by torch.no_grad: forward-mode differentiation goes on in there, and autocast of
            # older versions of torch keeps what it casts in there, without a graph, for later.
            matrix, seen = matrix.detach(), {k: v.detach() for k, v in parameters.items()}
        norm = (seen["dora_squares"] + self._growth(matrix, seen)).clamp_min(0).sqrt()
        ratio = self.magnitude(parameters) / torch.where(norm == 0, 1, norm)
        return torch.where(directed, ratio, 1)

    def directed(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which frozen rows have a direction: those whose norm is a number, and not zero."""
        squares = parameters["dora_squares"]
        return (squares > 0) & (squares < math.inf)

    def magnitude(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """`m` for each row; it has no meaning where the frozen row has no direction."""
        return parameters["dora_squares"].sqrt() + parameters["dora_delta_m"]

    def _growth(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """By how much the squares of rows grow from ``W0`` to ``V``: zero where B is."""
        b, a = scaled(parameters["lora_B"], self.scaling), parameters["lora_A"]
        crossed = 2 * (matrix @ a.mH) + b @ (a @ a.mH)
        return (crossed * b.conj()).sum(-1, keepdim=True).real


def _linear(
    method: DoRA,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """``ratio o (W0 x + s B A dropout(x)) + bias``: what LoRA gives, rescaled."""
    dropped = dropped_inputs(method, x, training)
    ratio = method.ratio(product.matrix.to(parameters["lora_A"].dtype), parameters)

    # Quoted, as the compiler of torch 2.6 makes no unions.
    def lora(
        x: Tensor, bias: "Tensor | None", left: Tensor, right: Tensor, dropped: "Tensor | None"
    ) -> Tensor:
        return low_rank_product(x, product, bias, (left, right), dropped, form=method.form)

    inputs = (x, bias, *method.factors(parameters), dropped)
    return rescaled(lora(*inputs), ratio, bias, lora, inputs)


def _conv(self: Any, input: Tensor) -> Tensor:
    """The same for a convolution of one group; the general way where LoRA has no other."""
    adapter = self._gift_adapters["weight"]
    method, parameters = adapter.delta_of(self)

    def lora(x: Tensor, left: Tensor, right: Tensor, dropped: "Tensor | None") -> Any:  # quoted too
        return low_rank_conv(self, x, (left, right), dropped, method.form)

    if is_usual(self) and self.groups == 1:
        dropped = dropped_inputs(method, input, self.training)
        inputs = (input, *method.factors(parameters), dropped)
        output = lora(*inputs)
        if output is not None:
            frozen = adapter.layout.to_matrix(self._gift_frozen("weight"))
            ratio = method.ratio(frozen.to(parameters["lora_A"].dtype), parameters)
            return rescaled(output, ratio, self.bias, lora, inputs, -1 - len(self.kernel_size))
    return convolve(self, input, self.weight, self.bias)


DoRA.forwards = linear_forwards(_linear) | {dotted(conv.forward): _conv for conv in CONVOLUTIONS}
