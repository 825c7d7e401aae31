"""All or nothing: what a network was before its strategy ran, and the way back.

A `Snapshot` is taken before any action runs. If something goes wrong, `rollback` restores the
network exactly, whatever foreign actions did to it. If all goes well, `commit` keeps only what
differs, as an `Undo`, which `disable_fine_tuning` applies. An `Undo` refers to modules and tensors
by object, so copies and pickles of the network carry a working one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.adapt import release_tensors
from gift.generated import plain_class
from gift.statistics import release_statistics

_OWN = ("_gift_adapters", "_gift_network", "_gift_mode")


class _Missing:
    """In an undo: nothing stood here. A class, so that copies and pickles keep its identity."""


@dataclass
class ModuleUndo:
    """What the actions of a strategy changed on one module, and what stood there before.

    Args:
        module: the module.
        plain: its class, where an action changed that.
        attributes: entries of ``module.__dict__``.
        entries: for each dictionary in it (parameters, submodules, hooks ...) entries of that.
        order: for each of those, the order of its keys.
    """

    module: nn.Module
    plain: type | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[Any, Any]] = field(default_factory=dict)
    order: dict[str, list[Any]] = field(default_factory=dict)

    def apply(self) -> None:
        """Put back what stood there before."""
        if self.plain is not None:
            self.module.__class__ = self.plain
        state = self.module.__dict__
        _put_back(state, self.attributes)
        for key, entries in self.entries.items():
            _put_back(state[key], entries)
            _reorder(state[key], self.order[key])


@dataclass
class Undo:
    """The way back from a fine-tuned network to the one it was.

    Args:
        modules: what changed on modules.
        requires_grad: the flags of the parameters, where they changed.
        values: for each module, values of parameters that are trained in place and of buffers.
    """

    modules: list[ModuleUndo] = field(default_factory=list)
    requires_grad: list[tuple[nn.Module, str, bool]] = field(default_factory=list)
    values: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)

    def refresh_values(self) -> None:
        """Take the values that the tensors in `values` have now for those of the base."""
        self.values = [(m, name, tensor_of(m, name).detach().clone()) for m, name, _ in self.values]

    def apply(self, network: nn.Module) -> None:
        """Undo everything."""
        for module in network.modules():
            release_tensors(module)
            release_statistics(module)
        with torch.no_grad():
            for module, name, value in self.values:
                tensor = tensor_of(module, name)
                if not value.is_meta:  # a value from the meta device was never there
                    tensor.copy_(value)
        for undo in self.modules:
            undo.apply()
        for module, name, flag in self.requires_grad:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad = flag


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, itself rather than the effective weight."""
    tensor = module._parameters.get(name)
    tensor = module._buffers.get(name) if tensor is None else tensor
    assert tensor is not None
    return tensor


class Snapshot:
    """The structure of a network, and the state of its parameters, before anything changes."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modules = [(m, type(m), dict(m.__dict__), _containers(m)) for m in network.modules()]
        named = [(m, name, p) for m, _, _, parts in self.modules
                 for name, p in parts["_parameters"].items() if p is not None]  # fmt: skip
        self.parameters = [
            (m, name, p, p.requires_grad, p.grad, None if is_lazy(p) else p.data)
            for m, name, p in named
        ]

    def rollback(self) -> None:
        """Restore everything, exactly."""
        for module, cls, state, containers in self.modules:
            if type(module) is not cls:
                module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, content in containers.items():
                _refill(state[key], content)
        for _, _, parameter, requires_grad, grad, data in self.parameters:
            if data is not None and _moved(parameter, data):
                parameter.data = data
            parameter.requires_grad = requires_grad
            parameter.grad = grad

    def commit(self, keep_values: bool) -> Undo:
        """What the actions changed, to be undone later.

        Args:
            keep_values: copy the values of what training changes in place.
        """
        undo = Undo(modules=list(self._changes()))
        undo.requires_grad = [
            (m, name, flag) for m, name, p, flag, _, _ in self.parameters if p.requires_grad != flag
        ]
        if keep_values:
            trained = {id(p): (m, name, p) for m, name, p, *_ in self.parameters if p.requires_grad}
            buffers = [
                (m, name, buffer)
                for m, _, _, parts in self.modules
                for name, buffer in parts["_buffers"].items()
                if buffer is not None and name not in m._non_persistent_buffers_set
            ]
            undo.values = [
                (m, name, tensor.detach().clone())
                for m, name, tensor in [*trained.values(), *buffers]
                if not is_lazy(tensor)
            ]
        return undo

    def _changes(self) -> Iterator[ModuleUndo]:
        for module, cls, state, containers in self.modules:
            undo = ModuleUndo(module)
            if plain_class(type(module)) is not cls:
                undo.plain = cls
            now = {k: v for k, v in module.__dict__.items() if k not in _OWN}
            undo.attributes = _difference(state, now)
            own = _delta_names(module)
            for key, before in containers.items():
                after = module.__dict__.get(key)
                if key in undo.attributes or not isinstance(before, dict):
                    continue
                after = {k: v for k, v in after.items() if k not in own}  # type: ignore[union-attr]
                if entries := _difference(before, after):
                    undo.entries[key], undo.order[key] = entries, list(before)
            if undo.plain is not None or undo.attributes or undo.entries:
                yield undo


def _containers(module: nn.Module) -> dict[str, Any]:
    kinds = (dict, list, set)
    return {k: v.copy() for k, v in module.__dict__.items() if isinstance(v, kinds)}


def _delta_names(module: nn.Module) -> set[str]:
    adapters = module.__dict__.get("_gift_adapters", {})
    return {name for adapter in adapters.values() for name in adapter.names.values()}


def _difference(before: dict[Any, Any], after: dict[Any, Any]) -> dict[Any, Any]:
    changed = {k: v for k, v in before.items() if k not in after or after[k] is not v}
    return changed | {k: _Missing for k in after if k not in before}


def _put_back(target: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for key, value in entries.items():
        if value is _Missing:
            target.pop(key, None)
        else:
            target[key] = value


def _reorder(target: dict[Any, Any], order: list[Any]) -> None:
    known = [(key, target.pop(key)) for key in order if key in target]
    late = list(target.items())
    target.clear()
    target.update(known + late)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _moved(parameter: Tensor, data: Tensor) -> bool:
    if parameter.shape != data.shape or parameter.dtype != data.dtype:
        return True
    return parameter.device != data.device or parameter.data_ptr() != data.data_ptr()
