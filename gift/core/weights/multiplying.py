"""Products with an effective weight by code that is not the layer's own forward.

``F.linear(x, layer.weight)`` in a network's forward, as in attention, gets what a layer's own fast
path gives: low-rank factors are applied beside the weight where that is cheaper, and neither inputs
nor the weight are kept for the backward pass where they can be computed again.
"""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.weights.calls import calls_so_far
from gift.kernels.effective_linear import effective_product
from gift.kernels.linear import Product
from gift.kernels.low_rank import low_rank_product
from gift.kernels.recomputed import is_small


def linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Multiply by a whole effective weight.

    Args:
        x: ``(..., in)``.
        weight: an `EffectiveWeight`, ``(out, in)``.
        bias: or None.

    Returns:
        None where torch's own product must do: outside of a network's call, since values computed
        there may become a weight; without gradients; for small inputs.
    """
    made = weight._gift_made
    usual = type(x) is Tensor and type(bias) in (Tensor, nn.Parameter, type(None))
    if made is None or not usual or weight.dim() != 2 or calls_so_far() is not None:
        return None
    if not torch.is_grad_enabled() or is_small(x):
        return None
    module, delta = weight._gift_source
    method, parameters = delta.delta_of(module)
    frozen, *others = made.again.tensors
    alone = delta.below is None and delta.layout.is_trivial
    if alone and method.low_rank_is_cheap and made.again.is_current():
        factors = method.scaled_low_rank(parameters)
        if factors is not None and all(map(operator.is_, parameters.values(), others)):
            *pair, scale = factors
            product = Product(module, frozen, False, delta.ways)
            return low_rank_product(x, product, bias, pair, scale=scale, form=method.form)
    return effective_product(x, made, bias, delta.ways)
