"""Fast paths for layers that do nothing but multiply by their matrix and add a bias."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.methods.base import Method, dotted

Product = Callable[[Tensor, Tensor | None], Tensor]


class LinearPath(Protocol):
    """How a method gives ``W' x + bias`` without making ``W'``.

    Called with the method, its parameters, the input ``x (..., columns)``, the product with the
    frozen matrix ``(x, bias) -> W0 x + bias``, the layer's bias or None, and whether it trains.
    """

    def __call__(
        self,
        method: Any,
        parameters: Mapping[str, Tensor],
        x: Tensor,
        product: Product,
        bias: Tensor | None,
        training: bool,
    ) -> Tensor:
        """The output, in the dtype of the product."""
        ...


def linear_forwards(path: LinearPath) -> dict[str, Callable[..., Any]]:
    """Entries for `Method.forwards`: ``nn.Linear``, and the ``Conv1D`` of transformers."""

    def linear(self: Any, input: Tensor) -> Tensor:
        method, parameters, frozen = _parts(self)
        if method is None:
            return F.linear(input, self.weight, self.bias)
        product: Product = lambda x, bias: F.linear(x, frozen, bias)  # noqa: E731 - a closure
        return path(method, parameters, input, product, self.bias, self.training)

    def conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
        method, parameters, frozen = _parts(self)
        if method is None:
            return _addmm(x, self.weight, self.bias)
        product: Product = lambda x, bias: _addmm(x, frozen, bias)  # noqa: E731 - a closure
        return path(method, parameters, x, product, self.bias, self.training)

    return {
        dotted(nn.Linear.forward): linear,
        "transformers.pytorch_utils.Conv1D.forward": conv1d_of_transformers,
    }


def _parts(module: Any) -> tuple[Method | None, dict[str, Tensor], Tensor]:
    """Method, parameters and frozen weight; no method where only the general way is right."""
    adapter = module._gift_adapters["weight"]
    frozen = module._gift_frozen("weight")
    if not adapter.reads_alike:
        return None, {}, frozen  # tied to a table that is read the other way round
    return *adapter.delta_of(module), frozen


def _addmm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])
