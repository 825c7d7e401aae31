"""Deltas: the tensors that a module gained, trained parameters and what belongs to them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from gift.generated import Generated


@dataclass
class Delta:
    """What a module knows of tensors that it gained.

    Args:
        names: from a method's names for them to those on the module.
        owner: the module that holds them where that is another one, None for itself.
    """

    names: dict[str, str] = field(default_factory=dict)
    owner: nn.Module | None = field(default=None, kw_only=True)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors by the method's names."""
        holder = module if self.owner is None else self.owner
        return {key: getattr(holder, name) for key, name in self.names.items()}

    def is_on_meta(self, module: nn.Module) -> bool:
        """Whether they are held by `module` and have no values yet."""
        names = self.names.values() if self.owner is None else ()
        return any(held(module, name)[name].is_meta for name in names)

    def reset(self, module: Any, key: str) -> None:
        """Give them their initial values, and a shape where they had none yet."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What a saved delta and this one must agree on; empty while that is unknown."""
        raise NotImplementedError


def deltas_of(module: nn.Module) -> dict[str, Delta]:
    """The deltas that `module` itself uses, by what they change."""
    state = module.__dict__
    return {**state.get("_gift_adapters", {}), **state.get("_gift_extensions", {})}


def added_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that methods added to `module` itself."""
    own = [delta for delta in deltas_of(module).values() if delta.owner is None]
    return [name for delta in own for name in delta.names.values()]


def held(module: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary of `module` in which its tensor of that name stands."""
    return module._buffers if name in module._buffers else module._parameters


def add_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Let `module` hold a tensor, as the buffer or parameter that a method made it."""
    if isinstance(value, nn.Buffer):
        module.register_buffer(name, value, persistent=value.persistent)
    else:
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        module.register_parameter(name, parameter)


def add_lazy_tensor(module: nn.Module, name: str, like: Tensor) -> None:
    """The same for a tensor without shape yet; `like` says whether it will be a buffer."""
    if isinstance(like, nn.Buffer):
        module.register_buffer(name, UninitializedBuffer(), persistent=like.persistent)
    else:
        module.register_parameter(name, UninitializedParameter())  # type: ignore[arg-type]


def remove_tensor(module: nn.Module, name: str) -> None:
    """Undo `add_tensor`."""
    del held(module, name)[name]
    module._non_persistent_buffers_set.discard(name)


def put_values(module: nn.Module, values: Mapping[str, Tensor], only_lazy: bool = False) -> None:
    """Give tensors that `module` holds other values, and a shape or device where they need one.

    Args:
        module: the module that holds them.
        values: by their names on the module.
        only_lazy: leave those alone that have a shape already.
    """
    with torch.no_grad():
        for name, value in values.items():
            holder = held(module, name)
            now: Any = holder[name]
            if is_lazy(now):
                now.materialize(value.shape, value.device, value.dtype)
            elif only_lazy:
                continue
            elif now.device != value.device:
                new = torch.empty_like(value)
                trained = isinstance(now, nn.Parameter)
                holder[name] = now = nn.Parameter(new, now.requires_grad) if trained else new
            now.copy_(value)


def settings_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """For each delta of `module`, its method and what that means for the result."""
    return {key: delta.settings for key, delta in deltas_of(module).items()}


def settings_misfits(module: nn.Module, path: str, metadata: Mapping[str, Any]) -> list[str]:
    """What a state's metadata says of deltas, where it is not what `module` has."""
    here, there = settings_of(module), metadata.get("gift")
    if there is None or not here or not all(here.values()) or here == there:
        return []
    return [f"{path or 'the network'} was trained with {there}, here it has {here}"]


def named_deltas(network: nn.Module) -> Iterator[tuple[nn.Module, str, Delta]]:
    """All deltas in `network` with the modules that use them."""
    for module in network.modules():
        for key, delta in deltas_of(module).items():
            yield module, key, delta


class DeltaModule(Generated):
    """What every module that gained tensors gains."""

    def _gift_added(self) -> list[str]:
        return added_names(self)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `to_empty` gives a network from the meta device memory without values: fill the delta's.
        own = deltas_of(self)  # type: ignore[arg-type]
        waiting = [key for key, delta in own.items() if delta.is_on_meta(self)]  # type: ignore[arg-type]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for key in waiting:
            own[key].reset(self, key)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *rest: Any
    ) -> None:
        *_, errors = rest
        problems = settings_misfits(self, prefix.rstrip("."), metadata)  # type: ignore[arg-type]
        errors += problems
        if not problems:
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[misc]
