"""All or nothing: what a network was before its strategy ran, and the way back.

A `Snapshot` is taken before any action runs. If something goes wrong, `rollback` restores the
network exactly, whatever foreign actions did to it. If all goes well, `commit` keeps only what
differs, as an `Undo`, which `disable_fine_tuning` applies. An `Undo` refers to modules and tensors
by object, so copies and pickles of the network carry a working one.
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.adapt import release_tensors
from gift.delta import added_names
from gift.extension import release_extensions
from gift.generated import plain_class, set_class
from gift.guard import KeptValues
from gift.statistics import release_statistics

OWN = ("_gift_adapters", "_gift_extensions", "_gift_network", "_gift_schedule", "_gift_mode")


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
        contents: of lists and sets in it, all that they held.
    """

    module: nn.Module
    plain: type | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[Any, Any]] = field(default_factory=dict)
    order: dict[str, list[Any]] = field(default_factory=dict)
    contents: dict[str, list[Any] | set[Any]] = field(default_factory=dict)

    def apply(self) -> None:
        """Put back what stood there before."""
        if self.plain is not None:
            set_class(self.module, self.plain)
        state = self.module.__dict__
        _put_back(state, self.attributes)
        for key, entries in self.entries.items():
            if key == "_modules":
                self._follow_modes(entries)
            _put_back(state[key], entries)
            _reorder(state[key], self.order[key])
        for key, content in self.contents.items():
            _refill(state[key], content)

    def present(self) -> "ModuleUndo":
        """The same with what stands now where something was changed: the way forth again."""
        state = self.module.__dict__
        return ModuleUndo(
            self.module,
            plain=None if self.plain is None else type(self.module),
            attributes=_as_now(state, self.attributes),
            entries={key: _as_now(state[key], entries) for key, entries in self.entries.items()},
            order={key: list(state[key]) for key in self.order},
            contents={key: type(old)(state[key]) for key, old in self.contents.items()},
        )

    def _follow_modes(self, originals: dict[Any, Any]) -> None:
        """Modules that come back take the mode of what stood in their place."""
        for name, original in originals.items():
            instead = self.module._modules.get(name)
            if isinstance(original, nn.Module) and instead is not None:
                original.train(instead.training)


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
            release_extensions(module)
            release_statistics(module)
        for undo in self.modules:
            undo.apply()
        with torch.no_grad():
            for module, name, value in self.values:
                put_value(tensor_of(module, name), value)
        for module, name, flag in self.requires_grad:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad = flag
        for left in nn.Module.parameters(network):
            left.grad = None


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, itself rather than the effective weight."""
    parameter = module._parameters.get(name)
    tensor = module._buffers[name] if parameter is None else parameter
    assert tensor is not None
    return tensor


def put_value(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor in place another value, and its shape and dtype."""
    if value.is_meta:
        return  # there was no value when it was kept
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.copy_(value)
    else:
        tensor.data = value.clone()


class Snapshot:
    """The structure of a network, and the state of its parameters, before anything changes."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = [(m, type(m), dict(m.__dict__), _contents(m)) for m in network.modules()]
        named = [
            (m, name, p)
            for m, _, _, contents in self.modules
            for name, p in contents.get("_parameters", {}).items()
            if p is not None
        ]
        self.parameters = [
            (m, name, p, p.requires_grad, _kept_grad(p), None if is_lazy(p) else p.data)
            for m, name, p in named
        ]

    @cached_property
    def values(self) -> KeptValues:
        """Within it, an action may write into the tensors of the network."""
        return KeptValues(tensor for _, _, tensor in self._tensors())

    @property
    def _foreign(self) -> bool:
        """Whether a foreign action ran, which may have changed values."""
        return "values" in vars(self)

    def _tensors(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Parameters and buffers as they were found; tied ones once for each name."""
        for module, name, parameter, *_ in self.parameters:
            yield module, name, parameter
        for module, _, _, contents in self.modules:
            for name, buffer in contents.get("_buffers", {}).items():
                if buffer is not None:
                    yield module, name, buffer

    def rollback(self) -> None:
        """Restore everything, exactly."""
        for module, cls, state, contents in self.modules:
            if type(module) is not cls:
                set_class(module, cls)
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, value in _filled(state, contents):
                _refill(value, contents.get(key, ()))
        for _, _, parameter, requires_grad, grad, data in self.parameters:
            parameter.grad = None  # which must have the dtype that the parameter has
            if data is not None and _moved(parameter, data):
                parameter.data = data
            parameter.requires_grad = requires_grad
            if grad is not None:
                grad[0].data = grad[1]
                parameter.grad = grad[0]
        if self._foreign:
            self.values.restore()

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
            undo.values = list(self._values())
        return undo

    def _values(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Copies of what training will change, or foreign actions have changed."""
        known = self.parameters if self._foreign else []
        data = {id(p): old for _, _, p, _, _, old in known if old is not None}
        seen: set[int] = set()
        for module, name, tensor in self._tensors():
            trained = tensor.requires_grad or name in module._buffers
            if not (trained or self._foreign) or id(tensor) in seen or is_lazy(tensor):
                continue
            seen.add(id(tensor))
            before = data.get(id(tensor), tensor)
            changed = self.values.original(before) if self._foreign else None
            if changed is not None:
                yield module, name, changed
            elif trained or _moved(tensor, before):
                yield module, name, before.detach().clone()

    def _changes(self) -> Iterator[ModuleUndo]:
        for module, cls, state, contents in self.modules:
            plain = None if plain_class(type(module)) is cls else cls
            attributes = _difference(state, module.__dict__, OWN)
            if "_gift_mode" in module.__dict__:
                attributes.pop("training", None)  # it knows the mode that was asked for last
            undo = ModuleUndo(module, plain, attributes)
            for key, value in _filled(state, contents):
                if key in attributes:
                    continue
                before = contents.get(key, type(value)())
                if not isinstance(value, dict):
                    if _differ(before, value):
                        undo.contents[key] = before
                elif entries := _difference(before, value, added_names(module)):
                    undo.entries[key], undo.order[key] = entries, list(before)
            if plain is not None or attributes or undo.entries or undo.contents:
                yield undo


@contextmanager
def all_or_nothing(network: nn.Module) -> Iterator[None]:
    """Whatever goes wrong within it, the network is as it was before."""
    snapshot = Snapshot(network)
    try:
        yield
    except BaseException:
        snapshot.rollback()
        raise


def _kept_grad(parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
    """The gradient, and its memory: a module that changes dtype or device changes it in place."""
    grad = parameter.grad
    return None if grad is None else (grad, grad.data)


_CONTAINERS = (dict, list, set)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the containers in a module; most are empty, and those are left out."""
    return {key: value.copy() for key, value in _filled(module.__dict__)}


def _filled(state: dict[str, Any], also: Container[str] = ()) -> list[tuple[str, Any]]:
    """The containers in the state of a module that hold something, and those `also` named."""
    items = state.items()
    return [(k, v) for k, v in items if isinstance(v, _CONTAINERS) and (v or k in also)]


def _difference(
    before: dict[Any, Any], after: dict[Any, Any], own: Container[str]
) -> dict[Any, Any]:  # fmt: skip
    """What `before` had otherwise than `after`, where `own` keys are not counted as new."""
    changed = {k: v for k, v in before.items() if after.get(k, _Missing) is not v}
    return changed | {k: _Missing for k in after.keys() - before.keys() if k not in own}


def _differ(before: Any, after: Any) -> bool:
    """Whether two lists or sets hold other objects; what they hold may not compare (tensors)."""
    if isinstance(before, set):
        return before != after
    return len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True))


def _as_now(state: dict[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    return {key: state.get(key, _Missing) for key in keys}


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
    if parameter is data:
        return False
    if parameter.shape != data.shape or parameter.dtype != data.dtype:
        return True
    return parameter.device != data.device or parameter.data_ptr() != data.data_ptr()
