"""Snapshots and transactions: change a network completely or not at all, and undo the change.

A `Snapshot` is taken before any action runs. If something goes wrong, `rollback` restores the
network exactly, whatever actions of other authors did to it. If all goes well, `commit` keeps only
the differences, as an `Undo`, which `disable_fine_tuning` applies. An `Undo` refers to modules and
tensors by object, so copies and pickles of the network contain a working one.

`rollback` and `Undo` compare first and write only what differs, because something that nobody
changed belongs to its author and may refuse writes. Their steps allocate no large memory, call no
author's code and can be repeated. A second pass therefore completes what an interrupt cut off.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from types import MemberDescriptorType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import added_names
from gift.core.dynamic_class import plain_class, set_class
from gift.core.frozen_base import watch
from gift.core.undo.containers import (
    Missing,
    copied,
    differ,
    difference,
    filled,
    restore,
)
from gift.core.undo.copy_on_write import CopyOnWrite, parts_of
from gift.core.undo.frames import OWN, Below
from gift.core.undo.undo import ModuleUndo, Undo, attributes_of, completed, place_of, put_value
from gift.private.torch.calls import as_called
from gift.support.interrupts import held_interrupts
from gift.support.tensors import set_data, set_flag


class _Kept:
    """The flag, memory and gradient of a parameter or buffer, as they were found."""

    __slots__ = ("data", "flag", "grad", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.flag = tensor.requires_grad
        self.data = None if is_lazy(tensor) else tensor.data
        # Keep ``grad.data`` too: `Module.to` changes the gradient in place.
        grad = tensor.grad if tensor.is_leaf else None
        self.grad = None if grad is None else (grad, grad.data)

    def restore(self) -> None:
        tensor, grad = self.tensor, self.grad
        moved = self.data is not None and _moved(tensor, self.data)
        if moved:
            tensor.grad = None  # must have the dtype of its tensor
            set_data(tensor, self.data)  # type: ignore[arg-type]
        set_flag(tensor, self.flag)
        if grad is None:
            if tensor.is_leaf and tensor.grad is not None:
                tensor.grad = None
            return
        if _moved(*grad):
            grad[0].data = grad[1]
        if tensor.grad is not grad[0]:
            tensor.grad = grad[0]


class Snapshot:
    """The structure of a network and the state of its parameters before a change.

    Args:
        network: the network; its record of fine-tuning is included.
        objects: other objects whose attributes may change, with the containers in them, or
            dictionaries whose entries may change.
        writes: tensors that may be written to, whose values are copied.
    """

    def __init__(
        self, network: nn.Module, objects: Iterable[Any] = (), writes: Iterable[Tensor] = ()
    ) -> None:
        states = [(m, type(m), dict(attributes_of(m))) for m in network.modules()]
        for *_, state in states:
            as_called(state)  # not the call that makes other threads wait
        self.modules = [(m, cls, state, _contents(state)) for m, cls, state in states]
        slots = {cls: _slots(cls) for cls in {cls for _, cls, _ in states}}
        self.slots = [(slot, m, _value(slot, m)) for m, cls, _ in states for slot in slots[cls]]
        self.parameters = [
            (m, name, _Kept(p))
            for m, _, _, contents in self.modules
            for name, p in contents.get("_parameters", {}).items()
            if p is not None
        ]
        self.buffers = [
            (m, name, _Kept(buffer))
            for m, _, _, contents in self.modules
            for name, buffer in contents.get("_buffers", {}).items()
            if buffer is not None
        ]
        records = [state["_gift_network"] for *_, state in states if "_gift_network" in state]
        known = [vars(one) for r in records for one in (r, r.undo)]
        known += [one if isinstance(one, dict) else vars(one) for one in objects]
        self.objects = [(state, dict(state), _contents(state)) for state in known]
        # Clone the parts of quantised tensors: clone() of some subclasses would quantise again.
        written = [part for t in writes if not is_lazy(t) for part in parts_of(t)]
        self.written = [(part, part.detach().clone()) for part in written]

    @cached_property
    def values(self) -> CopyOnWrite:
        """The context in which an action may write into the tensors of the network."""
        return CopyOnWrite(kept.tensor for _, _, kept in self._tensors())

    @property
    def _foreign(self) -> bool:
        """Whether someone else's action ran, which may have changed values."""
        return "values" in vars(self)

    def _tensors(self) -> Iterator[tuple[nn.Module, str, _Kept]]:
        """Parameters and buffers as they were found; tied ones once for each name."""
        yield from self.parameters
        yield from self.buffers

    def rollback(self) -> None:
        """Restore everything exactly."""
        completed(self._restore)
        for module, _, state, _ in self.modules:
            if "_gift_network" in state:
                watch(module)

    def _restore(self) -> None:
        for module, cls, state, contents in self.modules:
            if type(module) is not cls:
                set_class(module, cls)
            _restore_state(attributes_of(module), state, contents)
        for now, state, contents in self.objects:
            _restore_state(now, state, contents)
        for slot, module, value in self.slots:
            if _value(slot, module) is not value:
                slot.__delete__(module) if value is Missing else slot.__set__(module, value)
        for _, _, kept in self._tensors():
            kept.restore()
        if self._foreign:
            self.values.restore()
        for tensor, value in self.written:
            put_value(tensor, value)

    def commit(self, keep_values: bool, below: Below | None = None) -> Undo:
        """Return what the actions changed, for undoing it later.

        Args:
            keep_values: copy the values of what training changes in place.
            below: the fine-tuned network as it was, if it was one.
        """
        undo = Undo(modules=list(self._changes()), below=below)
        undo.requires_grad = [(m, name, kept.flag) for m, name, kept in self.parameters]
        if keep_values:
            undo.values = list(self._values())
            now = {(m, name): kept.tensor for m, name, kept in self._tensors()}
            undo.recast = [
                (m, name)
                for m, name, value in undo.values
                if (value.dtype, value.device) != (now[m, name].dtype, now[m, name].device)
            ]
        return undo

    def _values(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Copies of values that training will change, or that foreign actions have changed."""
        seen: set[int] = set()
        for module, name, kept in self._tensors():
            tensor = kept.tensor
            trained = tensor.requires_grad or name in module._buffers
            if not (trained or self._foreign) or id(tensor) in seen or is_lazy(tensor):
                continue
            seen.add(id(tensor))
            before = tensor if kept.data is None else kept.data
            changed = self.values.original(before) if self._foreign else None
            if changed is not None:
                yield module, name, changed
            elif trained or _moved(tensor, before):
                yield module, name, before.detach().clone()

    def _changes(self) -> Iterator[ModuleUndo]:
        for module, cls, state, contents in self.modules:
            plain = None if plain_class(type(module)) is plain_class(cls) else plain_class(cls)
            now = attributes_of(module)
            attributes = difference(state, now, OWN)
            if "_gift_mode" in now:
                attributes.pop("training", None)  # it holds the mode that was requested last
            undo = ModuleUndo(module, plain, attributes)
            for key, value in filled(state, contents):
                if key in attributes:
                    continue
                present = copied(value)
                before = contents.get(key) or type(present)()
                if not isinstance(before, dict):
                    if differ(before, value):
                        undo.contents[key] = before
                elif entries := difference(before, present, added_names(module)):
                    undo.entries[key], undo.order[key] = entries, list(before)
                    if key == "_modules":
                        new = {name: module._modules.get(name) for name in entries}
                        undo.places = {n: place_of(m) for n, m in new.items() if m is not None}
            if plain is not None or attributes or undo.entries or undo.contents:
                yield undo


class transaction(held_interrupts):
    """Context that restores the network if anything in it fails.

    Signals wait until the change is complete or undone. Python delivers none to other threads.

    Args:
        network, objects, writes: as in `Snapshot`.
        open: let signals through, which then undo the change: for changes that may take long.
            The garbage collector waits meanwhile.
    """

    def __init__(
        self,
        network: nn.Module,
        *objects: Any,
        writes: Iterable[Tensor] = (),
        open: bool = False,
    ) -> None:
        super().__init__(open)
        self._of = network, objects, writes
        self._before: Snapshot | None = None
        self._is_decided = False
        self._collects = open and gc.isenabled()
        self._with_gradients = torch.is_grad_enabled()

    def __enter__(self) -> Self:
        try:
            super().__enter__()
            if self._collects:  # all that such a change makes stays: a collection finds nothing
                gc.disable()
            self._before = Snapshot(*self._of)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    @property
    def before(self) -> Snapshot:
        """The snapshot of the network before the change."""
        assert self._before is not None
        return self._before

    def finish(self, step: Callable[[], None]) -> None:
        """Run the last, repeatable step: from now on, the change is completed, not undone."""
        self._is_decided = True
        completed(step)

    def ending(self, *error: object) -> None:
        """Undo everything if the change was not completed."""
        if error[0] is not None and self._before is not None and not self._is_decided:
            self._before.rollback()
        if self._collects:
            gc.enable()
        if error[0] is not None:  # a signal can prevent torch's contexts from exiting
            torch.set_grad_enabled(self._with_gradients)


def all_or_nothing(network: nn.Module) -> transaction:
    """A transaction that a signal can interrupt and thereby undo, for changes that take long."""
    return transaction(network, open=True)


def _restore_state(now: dict[str, Any], state: dict[str, Any], contents: dict[str, Any]) -> None:
    restore(now, state)
    for key, value in filled(state, contents):
        restore(value, contents.get(key) or copied(value).__class__())


def _contents(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of the containers in a module; empty ones (most) are left out."""
    return {key: copied(value) for key, value in filled(state)}


def _slots(cls: type) -> list[MemberDescriptorType]:
    """The slots of a class, which hold attributes of instances outside of their ``__dict__``."""
    own = [value for base in cls.__mro__[:-1] for value in vars(base).values()]
    return [value for value in own if isinstance(value, MemberDescriptorType)]


def _value(slot: MemberDescriptorType, module: nn.Module) -> Any:
    try:
        return slot.__get__(module)
    except AttributeError:
        return Missing


def _moved(parameter: Tensor, data: Tensor) -> bool:
    if parameter is data:
        return False
    if parameter.shape != data.shape or parameter.dtype != data.dtype:
        return True
    return parameter.device != data.device or parameter.data_ptr() != data.data_ptr()
