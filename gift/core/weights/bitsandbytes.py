"""Adapted layers of bitsandbytes, whose own code expects their packed weight."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.dynamic_class import Generated, Spec, plain_class
from gift.layers.table import operation_of


class QuantisedLayer(Generated):
    """Mixin of these layers: save and load the packed weight instead of the effective one."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        try:
            _plain_view(self)._save_to_state_dict(destination, prefix, keep_vars)
        except NotImplementedError:  # embeddings cannot save their weight, but the delta can
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
            del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, *args: Any) -> None:
        _plain_view(self)._load_from_state_dict(*args)


def _plain_view(module: nn.Module) -> Any:
    """An object of the plain class with the same attributes, which reads the frozen weight."""
    plain = plain_class(type(module))
    view: Any = object.__new__(plain)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def _linear(self: Any, x: Tensor) -> Tensor:
    dtype = getattr(self, "compute_dtype", None) or x.dtype
    bias = None if self.bias is None else self.bias.to(dtype)
    return F.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)


def _embedding(self: Any, input: Tensor) -> Tensor:
    return F.embedding(input, self.weight, self.padding_idx).to(self.dtype)


_FORWARDS = {"packed linear": _linear, "packed embedding": _embedding}


def feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Save and load packed weights, and compute with effective weights."""
    packed = spec.tensors and issubclass(plain, nn.Module)
    forward = _FORWARDS.get(operation_of(plain)) if packed else None
    if forward is None:
        return [], {}
    return [QuantisedLayer, type("AnyWeight", (Generated,), {"forward": forward})], {}
