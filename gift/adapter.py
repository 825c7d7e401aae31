"""What a module knows of a tensor that was adapted, and how the two make the effective weight."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from gift.generated import plain_class
from gift.layers import Layout, LayoutOptions, layout_of
from gift.methods import Method


@dataclass
class Adapter:
    """What a module knows of one adapted tensor of its own.

    Args:
        method: the method, fitted to the tensor's shape once that is known.
        options: the choice of layouts.
        names: from the method's parameter names to those on the module.
        layout: how the tensor is read as a matrix; None while a lazy tensor has no shape.
        owner: the module that holds the delta where the tensor is tied, None for itself.
    """

    method: Method
    options: LayoutOptions
    names: dict[str, str] = field(default_factory=dict)
    layout: Layout | None = None
    owner: nn.Module | None = None

    def delta_of(self, module: nn.Module) -> tuple[Method, dict[str, Tensor]]:
        """The method and its parameters for the adapted tensor of `module`."""
        holder = module if self.owner is None else self.owner
        return self.method, {key: getattr(holder, name) for key, name in self.names.items()}

    def weight(self, module: nn.Module, frozen: Tensor) -> Tensor:
        """The effective weight, in the frozen one's dtype, rounded once."""
        if self.layout is None or is_sharded(frozen):
            return frozen
        method, parameters = self.delta_of(module)
        if method.dropout and module.training:
            parameters = method.drop(parameters, self.layout.input_axis)
        matrix = self.layout.to_matrix(frozen).to(method.delta_dtype(frozen))
        return self.layout.to_weight(method.weight(matrix, parameters)).to(frozen.dtype)

    def is_on_meta(self, module: Any) -> bool:
        """Whether the delta is held by `module` and has no values yet."""
        names = self.names.values() if self.owner is None else ()
        return any(module._parameters[name].is_meta for name in names)

    def reset(self, module: Any, tensor: str) -> None:
        """Give the delta its initial values, and a shape where it had none yet."""
        if self.owner is not None:
            self.layout = adapters_of(self.owner)[tensor].layout
            return
        with looking(module):
            frozen = module._gift_frozen(tensor)
        if is_lazy(frozen):
            return
        unknown = self.layout is None
        if self.layout is None:
            layout = layout_of(module, tensor, frozen.shape, self.options)
            self.method, self.layout = self.method.fit(layout.matrix), layout
        with torch.no_grad():
            for key, value in self.method.init(self.layout.to_matrix(frozen.detach())).items():
                parameter = module._parameters[self.names[key]]
                if isinstance(parameter, UninitializedParameter):
                    parameter.materialize(value.shape, value.device, value.dtype)
                elif unknown:
                    continue  # a state was loaded before the first forward: it has its values
                elif parameter.device != value.device:
                    parameter = nn.Parameter(torch.empty_like(value), parameter.requires_grad)
                    module._parameters[self.names[key]] = parameter
                parameter.copy_(value)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a part of one that is spread over processes."""
    # FSDP2 asks a module for its leaf while the parameters are sharded; the effective weight exists
    # only between unshard and reshard, when the parameters are plain tensors.
    return hasattr(tensor, "device_mesh")


def adapters_of(module: nn.Module) -> Mapping[str, Adapter]:
    """The adapted tensors of `module` itself, by name."""
    return module.__dict__.get("_gift_adapters", {})


def added_names(module: nn.Module) -> list[str]:
    """Names of the parameters that methods added to `module` itself."""
    own = [adapter for adapter in adapters_of(module).values() if adapter.owner is None]
    return [name for adapter in own for name in adapter.names.values()]


def settings_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """For each adapted tensor of `module`, its method and what that means for the weight."""
    return {t: {"method": a.method.name} | a.method.meaning for t, a in adapters_of(module).items()}


def settings_misfits(module: nn.Module, path: str, metadata: Mapping[str, Any]) -> list[str]:
    """What a state's metadata says of a delta, where it is not what `module` has."""
    here, there = settings_of(module), metadata.get("gift")
    unknown = any(a.layout is None for a in adapters_of(module).values())  # lazy, yet to be fitted
    if there is None or unknown or not here or here == there:
        return []
    return [f"{path or 'the network'} was trained with {there}, here it has {here}"]


def plain_tensor(module: nn.Module, tensor: str) -> Any:
    """The tensor of `module` itself, whatever was adapted: parameter, or computed; or None."""
    value = module._parameters.get(tensor)
    if value is None:
        value = module.__dict__.get(tensor)
    if value is None:
        computed = getattr(plain_class(type(module)), tensor, None)
        value = computed.fget(module) if isinstance(computed, property) else None  # type: ignore[misc]
    return value


@contextmanager
def looking(module: nn.Module) -> Iterator[None]:
    """Within it, reading a computed tensor changes nothing.

    A spectral norm moves its estimate at each reading in training mode.
    """
    computing = module._modules.get("parametrizations")
    parts = list(computing.modules()) if computing is not None else []
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
