"""(IA)^3: factors for the features that go through a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.fast.linear import Product, linear_forwards
from gift.fast.low_rank import CONVOLUTIONS, is_usual
from gift.fast.rescale import rescaled
from gift.methods.base import Method, dotted, register_method
from gift.methods.settings import flag
from gift.private.torch import convolve


@register_method
@dataclass(frozen=True)
class IA3(Method):
    r"""Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022,
    https://arxiv.org/abs/2205.05638).

    .. math:: y' = l \odot (W_0 x + b), \qquad \text{or} \quad y' = W_0 (l \odot x) + b

    For a matrix ``(rows, columns)`` it adds ``ia3_l (rows, 1)``, one factor for each output, or, of
    a layer whose inputs are scaled, ``ia3_l (1, columns)``; all start at one. That is `rows` (or
    `columns`) parameters. Scaled outputs include the layer's bias, which is why `ma_adapt` also
    adapts that; `pa_adapt` changes the one parameter that it is given.

    The paper scales the outputs of the key and value projections, and the inputs of the second
    layer of each feed-forward block::

        (mc_path(regex=r"key|value"), ma_adapt("ia3")),
        (mc_path(glob="*.output.dense"), ma_adapt("ia3", feedforward=True)),

    Args:
        feedforward: scale inputs instead of outputs; of a convolution with a kernel, each position
            in the kernel has a factor of its own.
        dtype: of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "IA3"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True

    feedforward: bool = flag()

    @property
    def scales_outputs(self) -> bool:  # type: ignore[override]
        """Whether biases take part."""
        return not self.feedforward

    def init(self, matrix: Tensor) -> dict[str, Tensor]:
        """All factors one."""
        *groups, rows, columns = matrix.shape
        shape = (1, columns) if self.feedforward else (rows, 1)
        return {"ia3_l": torch.ones(*groups, *shape, **self.like(matrix))}

    def weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Rows or columns times their factors."""
        # A bias that belongs to several weights has the factors of each, one after the other.
        factors = list(parameters.values())
        return matrix * (factors[0] if len(factors) == 1 else torch.cat(factors, -2))

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Factors as many times as far from one."""
        return {key: 1 + number * (factor - 1) for key, factor in parameters.items()}


def _linear(
    method: IA3,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Activations times their factors, so that no gradient of the weight's size is made."""
    factor = parameters["ia3_l"]
    if method.feedforward:
        return product.output((x * factor.squeeze(-2)).to(x.dtype), bias)
    return rescaled(product.output(x, bias), factor, bias, product.output, (x, bias))


def _conv(self: Any, input: Tensor) -> Tensor:
    """The same for channels; the general way where each position in a kernel has a factor."""
    adapter = self._gift_adapters["weight"]
    method, parameters = adapter.delta_of(self)
    axes = len(self.kernel_size)
    one_position = all(size == 1 for size in self.kernel_size)
    if not is_usual(self) or (method.feedforward and not one_position):
        return convolve(self, input, self.weight, self.bias)
    factor, frozen, bias = (
        parameters["ia3_l"],
        self._gift_frozen("weight"),
        self._gift_weight("bias", once=True),
    )
    if method.feedforward:
        seen = (input * factor.reshape(-1, *[1] * axes)).to(input.dtype)
        return convolve(self, seen, frozen, bias)

    # Quoted, as the compiler of torch 2.6 makes no unions.
    def compute(x: Tensor, bias: "Tensor | None") -> Tensor:
        return convolve(self, x, frozen, bias)

    return rescaled(compute(input, bias), factor, bias, compute, (input, bias), -1 - axes)


IA3.forwards = linear_forwards(_linear) | {dotted(conv.forward): _conv for conv in CONVOLUTIONS}
