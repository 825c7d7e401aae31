"""Fast paths for a delta on top of frozen ones, all of them low-rank, which are computed as one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gift.kernels.conv_layers import conv, conv_forwards, effective_conv
from gift.kernels.effective_linear import effective_forwards
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import linear
from gift.kernels.low_rank_lookup import lookup
from gift.layers.table import forwards_of

Forwards = dict[str, Callable[..., Any]]


def stacked_forwards() -> Forwards:
    """Return fast paths for a stack of deltas, by the forward that each one replaces.

    They use the effective weight unless the deltas are a sum, see `WeightDelta.is_sum`. Dropout
    acts on what the upper delta gets. In a convolution with dropout, the upper delta drops input
    features, as in a layer that reads its weight itself.
    """
    linears = linear_forwards(_linear)
    effective = effective_forwards()
    made: Forwards = {name: _where_sum(path, effective.get(name)) for name, path in linears.items()}
    made |= conv_forwards(_where_sum(_conv, effective_conv))
    return made | dict.fromkeys(forwards_of("embedding"), _where_sum(lookup, None))


def _where_sum(path: Callable[..., Any], other: Callable[..., Any] | None) -> Callable[..., Any]:
    # Parameters are named as in the layers themselves, since callers may pass them by name.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._gift_weights["weight"].is_sum(self):
            return path(self, *args, **kwargs)
        return (other or type(self)._gift_plain.forward)(self, *args, **kwargs)

    return forward


def _linear(
    method: Any,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute the frozen product plus the sum of the deltas; only the upper one has dropout."""
    if not (method.dropout and training):
        return linear(method, parameters, x, product, bias, training)
    upper = method.method.forwards[forwards_of("linear")[0]].path
    output = upper(method.method, method.own(parameters), x, product, bias, training)
    left, right = method.under(parameters)
    side = F.linear(F.linear(x.to(right.dtype), right), left)
    return (output + side).to(output.dtype)


def _conv(self: Any, input: Tensor) -> Any:
    if self._gift_weights["weight"].method.dropout and self.training:
        return type(self)._gift_plain.forward(self, input)
    return conv(self, input)
