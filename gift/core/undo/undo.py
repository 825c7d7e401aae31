"""The way back from a change: what an `Undo` holds, and how it is applied."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import set_class
from gift.core.forwards import unwrap_forwards
from gift.core.frozen_norms import release_statistics
from gift.core.undo.containers import (
    Missing,
    copied,
    put_entries,
    put_order,
    refill,
)
from gift.core.undo.frames import Below
from gift.core.weights.attach import release_tensors
from gift.support.sharding import distributed_like, is_sharded
from gift.support.tensors import is_expanded, same_bits, set_data, set_flag

_ATTRIBUTES: Any = vars(nn.Module)["__dict__"]


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The real ``__dict__`` of a module, even if its class overrides that name."""
    own: dict[str, Any] = _ATTRIBUTES.__get__(module)
    return own


def completed(step: Callable[[], None], passes: int = 4) -> None:
    """Run a repeatable step; if it is interrupted, run it again, then raise the interrupt."""
    try:
        step()
    except BaseException:
        if passes > 1:
            completed(step, passes - 1)
        raise


@dataclass
class ModuleUndo:
    """What the actions of a strategy changed on one module, with the previous values.

    Args:
        module: the module.
        plain: its previous class, if an action changed that.
        attributes: changed entries of ``module.__dict__``.
        entries: for each dictionary in it (parameters, submodules, hooks ...), the changed entries.
        order: for each of those dictionaries, the order of its keys.
        contents: for each changed list or set in it, everything that it held.
        places: dtype and device of new submodules. If these change, the originals follow.
    """

    module: nn.Module
    plain: type[nn.Module] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[Any, Any]] = field(default_factory=dict)
    order: dict[str, list[Any]] = field(default_factory=dict)
    contents: dict[str, list[Any] | set[Any]] = field(default_factory=dict)
    places: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self) -> None:
        """Restore the previous values."""
        if self.plain is not None:
            set_class(self.module, self.plain)
        state = attributes_of(self.module)
        put_entries(state, self.attributes)
        for key, entries in self.entries.items():
            if key == "_modules":
                self._follow(entries)
            put_entries(state[key], entries)
            put_order(state[key], self.order[key])
        for key, content in self.contents.items():
            refill(state[key], content)

    def present(self) -> "ModuleUndo":
        """The same entries with their present values, to redo the change after an undo."""
        state = attributes_of(self.module)
        return ModuleUndo(
            self.module,
            plain=None if self.plain is None else type(self.module),
            attributes=_as_now(state, self.attributes),
            entries={k: _as_now(copied(state[k]), entries) for k, entries in self.entries.items()},
            order={key: list(copied(state[key])) for key in self.order},
            contents={key: copied(state[key]) for key in self.contents},
        )

    def _follow(self, originals: dict[Any, Any]) -> None:
        """Give modules that come back the training mode of their replacements.

        They are also cast and moved as the replacements were.
        """
        for name, original in originals.items():
            instead = self.module._modules.get(name)
            if isinstance(original, nn.Module) and instead is not None and instead is not original:
                original.train(instead.training)
                was = vars(self).get("places", {}).get(name, {})
                if moved := {k: v for k, v in place_of(instead).items() if was.get(k, v) != v}:
                    original.to(**moved)
                    self.places[name] = place_of(instead)


@dataclass
class Undo:
    """What restores the base from a fine-tuned network.

    Args:
        modules: the changes of modules.
        requires_grad: the flags that the parameters had when the network was last the plain base.
        values: for each module, values of buffers and of parameters that are trained in place.
        recast: the entries of `values` whose dtype or device an action changed.
        below: the fine-tuned network that is the base, None if the base is a plain network.
    """

    modules: list[ModuleUndo] = field(default_factory=list)
    requires_grad: list[tuple[nn.Module, str, bool]] = field(default_factory=list)
    values: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    recast: list[tuple[nn.Module, str]] = field(default_factory=list)
    below: Below | None = None

    def value(self, module: nn.Module, name: str, kept: Tensor) -> Tensor:
        """A saved value, with the dtype and device that its tensor has now."""
        tensor = tensor_of(module, name)
        if kept.is_meta or any(m is module and n == name for m, n in vars(self).get("recast", ())):
            return kept
        kept = kept.to(device=tensor.device, dtype=tensor.dtype)
        if is_sharded(tensor) and not is_sharded(kept):  # it was made parallel since
            return distributed_like(kept, tensor)
        return kept

    def refresh_values(self) -> None:
        """Replace the saved values by the present ones, which belong to the base from now on."""
        self.values = [(m, name, tensor_of(m, name).detach().clone()) for m, name, _ in self.values]

    def apply(self, network: nn.Module) -> None:
        """Undo everything."""
        self.put_structure(network)
        self.put_values(self.present_values())

    def put_structure(self, network: nn.Module) -> None:
        """Undo everything except values."""
        for module in network.modules():
            release_tensors(module)
            unwrap_forwards(module)
            release_statistics(module)
        for undo in self.modules:
            undo.apply()
        if self.below is not None:
            self.below.put(network)
        for module, name, flag in self.requires_grad:
            if (parameter := module._parameters.get(name)) is not None:
                set_flag(parameter, flag)
        for left in nn.Module.parameters(network):
            left.grad = None

    def present_values(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a tensor and its value in the base, on the tensor's present device."""
        return [(tensor_of(m, name), self.value(m, name, kept)) for m, name, kept in self.values]

    @staticmethod
    def put_values(values: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Write the values; can be repeated."""
        with torch.no_grad():
            for tensor, value in values:
                put_value(tensor, value)


def place_of(module: nn.Module) -> dict[str, Any]:
    """Dtype and device of the first parameter of a module, as keyword arguments of ``to``."""
    parameter = next(nn.Module.parameters(module), None)
    return {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name` itself, not the effective weight."""
    parameter = module._parameters.get(name)
    tensor = module._buffers[name] if parameter is None else parameter
    assert tensor is not None
    return tensor


def put_value(tensor: Tensor, value: Tensor) -> None:
    """Set the value of a tensor in place, with its shape and dtype.

    An equal value is not written, because memory that nobody changed may be read-only (a mapped
    file).
    """
    if value.is_meta or same_bits(tensor, value):
        return  # there was no value to save, or it is equal
    alike = (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device)
    if alike and not is_expanded(tensor):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
    else:
        set_data(tensor, value.clone())


def _as_now(state: dict[str, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    return {key: state.get(key, Missing) for key in keys}
