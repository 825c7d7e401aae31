"""What is known of one kind of quantised tensor."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantisedRow:
    """One kind of quantised tensor. What is asked for a module needs it for one kind alone, which
    leaves a part of itself there.

    Args:
        kinds: dotted paths of its type; several where versions of the package differ.
        mark: an attribute by which it is known where its type was lost, as parameters lose theirs
            in a pickle.
        dequantise: from tensor and module, the matrix that it stands for.
        product: from tensor, module, input and bias, what its layer makes of the input.
        requantise: from tensor and another value, that value quantised in the same way.
        shape: the shape of the matrix.
        holds: whether it is quantised yet; some are floating-point until something happens.
        before: what must happen, in words.
        hold: from a tensor that its layer may pack in another order, what puts the present order
            back.
        stored: from tensor, module and name, the names under which a module saves what belongs to
            the tensor.
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
    """The matrix, found by multiplying by it."""
    one = torch.eye(columns, dtype=dtype, device=tensor.device)
    return multiply(tensor, module, one, None).T.contiguous()
