"""(IA)^3: factors for a layer's input or output features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.kernels.conv_layers import conv_forwards, effective_conv, is_usual
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.output_scales import scaled_conv, scaled_linear
from gift.kernels.rescale import scaled_input
from gift.methods.base import Method, register_method
from gift.methods.settings import flag
from gift.private.torch.layers import convolve


@register_method
@dataclass(frozen=True)
class IA3(Method):
    r"""Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022,
    https://arxiv.org/abs/2205.05638).

    .. math:: y' = l \odot (W_0 x + b), \qquad \text{or} \quad y' = W_0 (l \odot x) + b

    For a matrix ``(rows, columns)`` it adds ``ia3_l (rows, 1)``, one factor for each output, or
    ``ia3_l (1, columns)`` if inputs are scaled. All factors start at one. That is `rows` (or
    `columns`) parameters. Scaled outputs include the layer's bias, so `ma_adapt` adapts the bias
    too. `pa_adapt` changes only the parameter that it is given.

    The paper scales the outputs of the key and value projections, and the inputs of the second
    layer of each feed-forward block::

        (mc_path(regex=r"key|value"), ma_adapt("ia3")),
        (mc_path(glob="*.output.dense"), ma_adapt("ia3", feedforward=True)),

    Args:
        feedforward: scale inputs instead of outputs. In a convolution, each position in the kernel
            has its own factor.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "ia3"
    strategy_prefix: ClassVar[str] = "IA3"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True

    feedforward: bool = flag()

    @property
    def scales_outputs(self) -> bool:  # type: ignore[override]
        """Whether biases are adapted too."""
        return not self.feedforward

    @property
    def split_axes(self) -> dict[str, tuple[int | None, int | None]]:  # type: ignore[override]
        """The axis of the factors."""
        return {"ia3_l": (None, 1) if self.feedforward else (0, None)}

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return factors that are all one."""
        *groups, rows, columns = matrix.shape
        shape = (1, columns) if self.feedforward else (rows, 1)
        return {"ia3_l": torch.ones(*groups, *shape, **self.factory_kwargs(matrix))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Multiply rows or columns by their factors."""
        # A bias that belongs to several weights has the factors of each, concatenated.
        factors = list(parameters.values())
        return matrix * (factors[0] if len(factors) == 1 else torch.cat(factors, -2))

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the factors' distance from one by the number."""
        return {key: 1 + number * (factor - 1) for key, factor in parameters.items()}


def _linear(
    method: IA3,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Scale activations, so that no gradient of the weight's size is made."""
    factor = parameters["ia3_l"]
    if method.feedforward:
        seen = scaled_input(x, factor.squeeze(-2), -1, len(product.matrix), product.ways)
        return product.output(seen, bias)
    return scaled_linear(x, product, bias, factor)


def _conv(self: Any, input: Tensor) -> Tensor:
    """Scale channels; use the effective weight if each kernel position has its own factor."""
    method, parameters = self._gift_weights["weight"].delta_of(self)
    factor, axes = parameters["ia3_l"], len(self.kernel_size)
    if not method.feedforward:
        return scaled_conv(self, input, factor)
    if not is_usual(self) or any(size != 1 for size in self.kernel_size):
        return effective_conv(self, input)
    frozen, ways = self._gift_frozen("weight"), self._gift_weights["weight"].ways
    seen = scaled_input(input, factor.reshape(-1, *[1] * axes), -1 - axes, len(frozen), ways)
    return convolve(self, seen, frozen, self._gift_weight("bias", once=True))


IA3.forwards = linear_forwards(_linear) | conv_forwards(_conv)
