"""Fast paths for methods that scale each output of a layer by a factor."""

from typing import Any

from torch import Tensor

from gift.kernels.conv_layers import effective_conv, is_usual
from gift.kernels.linear import Product
from gift.kernels.rescale import finite, rescaled
from gift.private.torch.layers import convolve


def scaled_linear(x: Tensor, product: Product, bias: Tensor | None, factor: Tensor) -> Tensor:
    """Compute ``factor o (W0 x) + bias``, without a gradient of the weight's size.

    Args:
        x: ``(..., columns)``.
        product: the product with the frozen matrix.
        bias: the effective bias, or None.
        factor: ``(rows, 1)``.
    """
    output, inputs = product.output(x, bias), (x, bias)
    return rescaled(output, *finite(factor, bias), product.output, inputs, ways=product.ways)


def scaled_conv(layer: Any, input: Tensor, factor: Tensor) -> Tensor:
    """Compute the same for a convolution: scale channels."""
    if not is_usual(layer):
        return effective_conv(layer, input)
    frozen, bias = layer._gift_frozen("weight"), layer._gift_weight("bias", once=True)

    # Annotations are quoted, since the compiler of torch 2.6 cannot evaluate unions.
    def compute(x: Tensor, bias: "Tensor | None") -> Tensor:
        return convolve(layer, x, frozen, bias)

    output, inputs = compute(input, bias), (input, bias)
    channel = -1 - len(layer.kernel_size)
    scales = finite(factor, bias, channel)
    ways = layer._gift_weights["weight"].ways
    return rescaled(output, *scales, compute, inputs, channel, ways)
