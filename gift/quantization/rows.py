"""The description of one kind of quantised tensor."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantisedRow:
    """One kind of quantised tensor.

    Functions receive the module only because one kind stores a part of itself there.

    Args:
        kinds: dotted paths of its type; several if versions of the package differ.
        mark: an attribute that identifies the kind when the type was lost, as that of parameters is
            in a pickle.
        dequantise: function of tensor and module that returns the matrix in floating point.
        product: function of tensor, module, input and bias that returns the layer's output.
        requantise: function of tensor and another value that quantises that value in the same way.
        shape: function of the tensor that returns the shape of the matrix.
        holds: whether the tensor is quantised yet; some are floating-point until something happens.
        before: what must happen for that, in words.
        hold: function of a tensor that its layer may repack, which returns a function that restores
            the present memory order.
        stored: function of tensor, module and name that returns the names under which a module
            saves what belongs to the tensor.
    """

    kinds: tuple[str, ...]
    dequantise: Callable[[Any, Any], Tensor]
    product: Callable[[Any, Any, Tensor, Tensor | None], Tensor]
    requantise: Callable[[Any, Tensor], Tensor | None]
    shape: Callable[[Any], torch.Size] = lambda tensor: tensor.shape
    holds: Callable[[Any], bool] = lambda tensor: True
    before: str = ""
    mark: str = ""
    hold: Callable[[Any], Callable[[], None]] = lambda tensor: lambda: None
    stored: Callable[[Any, Any, str], list[str]] = lambda tensor, module, name: []

    def matches(self, cls: type) -> bool:
        """Whether `cls` is this type of tensor or a subclass of it."""
        paths = (kind.rpartition(".") for kind in self.kinds)
        types = (getattr(sys.modules.get(package), name, ()) for package, _, name in paths)
        return any(issubclass(cls, kind) for kind in types)


def times_one(
    multiply: Callable[..., Tensor], tensor: Any, module: Any, columns: int, dtype: torch.dtype
) -> Tensor:
    """Recover the matrix by multiplying it by the identity."""
    one = torch.eye(columns, dtype=dtype, device=tensor.device)
    return multiply(tensor, module, one, None).T.contiguous()
