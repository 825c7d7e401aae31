"""Fast paths for layers that only multiply by a matrix and add a bias."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.parallel_linear import joined_output, local_operands, places_of
from gift.kernels.products import linear_output
from gift.kernels.recomputed import Ways
from gift.kernels.remembered import Remembered
from gift.layers.table import forwards_of
from gift.quantization import dequantised, is_quantised
from gift.quantization import product as quantised_product


@dataclass(frozen=True)
class Product:
    """The product with a frozen matrix.

    `output` is a method instead of ``__call__``, since the compiler of torch 2.6 cannot call an
    object that was created during tracing.

    Args:
        layer: the layer that holds the matrix.
        weight: the matrix as the layer holds it.
        transposed: whether `weight` is ``(in, out)``.
        ways: what is known of the layer's inputs, see `gift.kernels.recomputed.keep`.
    """

    layer: nn.Module
    weight: Tensor
    transposed: bool
    ways: Ways | None = None

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W0 x + bias``."""
        return linear_output(x, self.weight, bias, self.transposed)

    def output_of(self, matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W x + bias`` for another matrix ``W``, ``(out, in)``, as the layer computes."""
        return linear_output(x, matrix.mT if self.transposed else matrix, bias, self.transposed)

    @property
    def outputs(self) -> int:
        """The number of output features."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def remembered(self) -> Remembered:
        """What was made in the last call without gradients."""
        layer: Any = self.layer
        found: Remembered = layer._gift_weights["weight"].remembered
        return found

    @property
    def matrix(self) -> Tensor:
        """The frozen matrix, ``(out, in)``."""
        return self.weight.mT if self.transposed else self.weight


@dataclass(frozen=True)
class QuantisedProduct(Product):
    """The product computed by the kernel of a quantised layer, which reads the packed matrix."""

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W0 x + bias``."""
        return quantised_product(self.weight, self.layer, x, bias)

    def output_of(self, matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W x + bias`` for another matrix ``W``, which is not packed."""
        return F.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @property
    def outputs(self) -> int:
        """The number of output features, which the packed matrix does not show."""
        outputs: int = self.layer.out_features  # type: ignore[assignment]
        return outputs

    @property
    def matrix(self) -> Tensor:
        """The dequantised matrix, computed on each access."""
        return dequantised(self.weight, self.layer)


def product_of(layer: Any, transposed: bool) -> Product:
    """Return the product with the frozen matrix of an adapted layer."""
    frozen, delta = layer._gift_frozen("weight"), layer._gift_weights["weight"]
    ways = delta.ways if torch.is_grad_enabled() else None  # else no backward pass needs inputs
    if not is_quantised(frozen):
        return Product(layer, frozen, transposed, ways)
    if not transposed:
        return QuantisedProduct(layer, frozen, transposed, ways)
    return Product(layer, dequantised(frozen, layer), transposed, ways)


class LinearPath(Protocol):
    """How a method computes ``W' x + bias`` without making ``W'``.

    It is a function of the method, its parameters, the input ``x (..., columns)``, the product with
    the frozen matrix, the layer's bias or None, and whether the layer is in training mode.
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
        """Return the output, in the dtype of the product."""
        ...


def linear_forwards(path: LinearPath) -> dict[str, Callable[..., Any]]:
    """Return entries for `Method.forwards`: ``nn.Linear`` and the ``Conv1D`` of transformers."""

    def forward(self: Any, x: Tensor, transposed: bool) -> Tensor:
        delta = self._gift_weights["weight"]
        if not delta.reads_alike:  # tied to an embedding whose layout is transposed
            return Product(self, self.weight, transposed).output(x, self.bias)
        if delta.mesh_axes:
            return spread(self, x, transposed)
        method, parameters = delta.whole_delta_of(self)
        product = product_of(self, transposed)
        return path(
            method, parameters, x, product, self._gift_weight("bias", once=True), self.training
        )

    def spread(self: Any, x: Any, transposed: bool) -> Tensor:
        """Compute a layer whose weight tensor parallelism spreads over processes."""
        weight, delta = self._gift_frozen("weight"), self._gift_weights["weight"]
        bias = self._gift_weight("bias", once=True)
        places = places_of(x, weight, bias, transposed)
        if places is None:  # torch moves tensors first, or refuses them
            return Product(self, self.weight, transposed).output(x, bias)
        seen, own_bias = local_operands(x, bias, places)
        method, parameters = delta.local_delta_of(self, weight, places.partial)
        product = Product(self, weight.to_local(), transposed, delta.ways)
        y = path(method, parameters, seen, product, own_bias, self.training)
        return joined_output(y, x, weight.shape[int(transposed)], places)

    def linear(self: Any, input: Tensor) -> Tensor:
        return forward(self, input, transposed=False)

    # Parameters are named as in the layer itself, since callers may pass them by name.
    def linear_of_bitsandbytes(self: Any, x: Tensor) -> Tensor:
        return forward(self, x, transposed=False)

    def conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
        return forward(self, x, transposed=True)

    linear.path = path  # type: ignore[attr-defined]
    return {
        **dict.fromkeys(forwards_of("linear"), linear),
        **dict.fromkeys(forwards_of("packed linear"), linear_of_bitsandbytes),
        **dict.fromkeys(forwards_of("transposed linear"), conv1d_of_transformers),
    }
