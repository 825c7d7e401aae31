"""Fast paths for methods whose delta is a product of two factors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.conv_layers import (
    conv,
    conv_forwards,
    conv_transpose,
    conv_transpose_forwards,
)
from gift.kernels.cost_model import Form, linear_form
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.little import little_linear
from gift.kernels.low_rank_linear import LowRankLinear, outputs
from gift.kernels.low_rank_lookup import lookup
from gift.kernels.operands import WATCHING, dropped_inputs, only_beside, operands, tell
from gift.kernels.products import scaled
from gift.kernels.torch_state import autocasts
from gift.layers.table import forwards_of
from gift.private.torch.tracing import is_transformed


def low_rank_forwards() -> dict[str, Callable[..., Any]]:
    """Return entries for `Method.forwards`, for methods with `Method.low_rank`."""
    lookups = dict.fromkeys(forwards_of("embedding"), lookup)
    convolutions = conv_forwards(conv) | conv_transpose_forwards(conv_transpose)
    return linear_forwards(linear) | convolutions | lookups


def low_rank_product(
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    dropped: Tensor | None = None,
    scale: float = 1,
    form: Form | None = None,
) -> Tensor:
    """Compute ``W0 x + bias + s left right x``, in the dtype of the product.

    Args:
        x: ``(..., columns)``.
        product: the product with the frozen matrix.
        bias: bias of the layer, or None.
        factors: `left` and `right`.
        dropped: the factors' input, if it is not `x`.
        scale: `s`.
        form: see `gift.kernels.cost_model`; None chooses the cheapest.
    """
    left, right = factors
    if type(product) is Product:
        if dropped is None and form in (None, "side"):
            y = _one_row(x, product.matrix, bias, left, right, scale)
            if y is not None:
                return y
        alike = operands(x, product.matrix, bias, left, right, dropped)
    else:
        alike = None
    if alike is not None:
        x, weight, bias, left, right, dropped = alike
        if form is None and dropped is None:
            little = little_linear(product.layer, x, weight, bias, left, right, scale)
            if little is not None:
                return little
        trained = torch.is_grad_enabled()
        chosen = linear_form(
            tuple(weight.shape),
            right.shape[0],
            x.numel() // max(1, x.shape[-1]),
            trained=trained,
            form="side" if only_beside(x, dropped) else form,
            on_processor=x.device.type == "cpu",
        )
        tell(product.layer, chosen)
        if not trained:  # autograd's overhead takes longer than a small layer
            return outputs(x, weight, bias, left, right, scale, dropped, chosen)[0]
        output: Tensor = LowRankLinear.apply(
            x, weight, bias, left, right, scale, dropped, chosen, product.ways
        )
        return output
    output = product.output(x, bias)
    hidden = F.linear((x if dropped is None else dropped).to(right.dtype), right)
    return (output + F.linear(hidden, scaled(left, scale))).to(output.dtype)


def _one_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float
) -> Tensor | None:
    """Compute the layer for one row without gradients, as for each token that is generated.

    The products take a few microseconds, and to decide as for other inputs takes longer than that.
    """
    dtype = x.dtype
    if (
        torch.is_grad_enabled()
        or x.numel() != right.shape[1]
        or dtype != right.dtype
        or dtype != left.dtype
        or dtype != weight.dtype
        or (bias is not None and dtype != bias.dtype)
        or WATCHING
        or is_transformed()
        or torch.compiler.is_compiling()
        or autocasts("cpu" if x.is_cpu else x.device.type)
    ):
        return None
    y = F.linear(x, weight, bias)
    y.view(-1, 1).addmm_(left, right @ x.reshape(-1, 1), alpha=scale)
    return y


def linear(
    method: Any,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute the frozen product plus the delta, whose input is dropped out in training."""
    dropped = dropped_inputs(method, x, training)
    *factors, scale = method.scaled_low_rank(parameters)
    return low_rank_product(x, product, bias, factors, dropped, scale, method.form)
