"""Remove fine-tuning from a network and put it back later."""

import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import added_names, held
from gift.core.dynamic_class import (
    Spec,
    generated_class,
    joined,
    plain_class,
    set_class,
    spec_of,
)
from gift.core.frozen_base import HELD, hold_flags
from gift.core.frozen_norms import kept_modes
from gift.core.holders import refuse_held_elsewhere
from gift.core.network import remove_record
from gift.core.record import record_of
from gift.core.undo.snapshot import OWN, transaction
from gift.core.undo.temporary_state import meanwhile
from gift.core.undo.undo import ModuleUndo, completed, place_of, tensor_of
from gift.core.undo.undoable import check_undoable
from gift.core.weights.mixin import is_parametrized
from gift.core.weights.record import weight_deltas
from gift.errors import GiftWarning, some
from gift.quantization import as_packed
from gift.support.interrupts import switching
from gift.support.tensors import set_data, set_flag, with_data


class UnloadedDelta:
    """What fine-tuning added to a network, removed from it: the network is the plain base.

    Deltas and new modules keep their identity, so an optimizer that holds them continues after they
    are back. No tensor is copied.

    Args:
        network: a network that is being fine-tuned.

    Raises:
        RuntimeError: if it is not being fine-tuned, or its base was not kept.
    """

    def __init__(self, network: nn.Module) -> None:
        check_undoable(network)
        if any(is_lazy(parameter) for _, _, parameter in _parameters(network)):
            raise RuntimeError("some layers have no shape yet: run a batch through them first")
        record = record_of(network)
        undo = record.undo
        self.network = network
        self.record = record
        self.frames = [_Frame(m) for m in network.modules() if spec_of(m) != Spec()]
        self.changes = [change.present() for change in undo.modules]
        for change in self.changes:
            change.plain = None if change.plain is None else plain_class(change.plain)
        # Save the flags of all parameters: those of the base may change before this is put back.
        self.flags = [(m, name, p.requires_grad) for m, name, p in _parameters(network)]
        tensors = [tensor_of(m, name) for m, name, _ in undo.values]
        self.values = [(t, t.data, t.requires_grad, t.grad) for t in tensors]
        undo.values = [(m, name, undo.value(m, name, value)) for m, name, value in undo.values]
        self.dtypes = [value.dtype for _, _, value in undo.values]
        self.held = [(m, vars(m)[HELD]) for m in network.modules() if HELD in vars(m)]
        remove_record(network)
        replace(undo, values=[]).apply(network)
        self.plain = [_unparametrized(type(frame.module)) for frame in self.frames]
        replaced = _replaced(undo.modules, self.changes)
        self.replaced = [(base, new, place_of(base)) for base, new in replaced]
        # Swap the memory of tensors instead of writing: a write would break graphs that wait for
        # `backward`.
        for module, name, value in undo.values:
            if not value.is_meta or tensor_of(module, name).is_meta:
                set_data(tensor_of(module, name), value)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context in which it is on the base, to be read; afterwards it is as before, bit for bit.

        If the base was cast since, the deltas follow it inside the context alone.
        """
        own = [(p, p.data, p.grad) for frame in self.frames for p in frame.added]
        try:
            self.attach()
            yield
            UnloadedDelta(self.network)  # equal to this one: nothing has changed
        finally:
            for parameter, data, grad in own:
                if (parameter.dtype, parameter.device) != (data.dtype, data.device):
                    parameter.grad = None  # must have the dtype of its tensor
                    set_data(parameter, data)
                    parameter.grad = grad

    def exchanged(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of the memory taken from the base and what the base has instead."""
        values = [value for *_, value in self.record.undo.values]
        return [(kept[1], value) for kept, value in zip(self.values, values, strict=True)]

    def _refuse(self) -> None:
        """Refuse a base onto which this cannot be put back."""
        found = {module: name for name, module in self.network.named_modules()}
        # Lists, in the order of the network: messages name modules in this order, not in a set's.
        changed = [
            frame.module
            for frame, plain in zip(self.frames, self.plain, strict=True)
            if _unparametrized(type(frame.module)) is not plain
        ]
        if tuned := [str(found.get(m)) for m in changed if spec_of(m) != Spec()]:
            raise RuntimeError(
                f"{some(tuned)} are being fine-tuned by another strategy: disable that first"
            )
        gone = [m for m, name, _ in self.record.undo.values
                if name not in m._parameters and name not in m._buffers]  # fmt: skip
        if names := [found.get(m) for m in dict.fromkeys((*changed, *gone))]:
            raise RuntimeError(
                f"{names} were parametrised although they are trained in place, or their class was "
                "changed in another way: undo that before the deltas are put back"
            )
        refuse_held_elsewhere(self.network)

    def attach(self) -> None:
        """Put it back onto the base as it is now.

        Raises:
            RuntimeError: if layers have another class than before, or are fine-tuned by another
                strategy; if a tensor that was trained in place is computed now; if another network
                that is being fine-tuned holds a parameter. Nothing is changed then.
        """
        self._refuse()
        undo = self.record.undo
        # Take the present flags of the base, whoever set them: disabling restores these.
        undo.requires_grad = [
            (m, name, p.requires_grad) for m, name, p in _parameters(self.network)
        ]
        undo.values = [(m, name, tensor_of(m, name).data) for m, name, _ in undo.values]
        for base, new, place in self.replaced:
            if moved := {k: v for k, v in place_of(base).items() if place.get(k) != v}:
                new.to(**moved)
        for change in self.changes:
            change.apply()
        cast: dict[int, Tensor] = {}
        for frame in self.frames:
            frame.apply(cast)
        flags = {(id(module), name): flag for module, name, flag in self.flags}
        for module, name, parameter in _parameters(self.network):
            # A parameter that is new since then (a parametrization computes a weight from it) is
            # frozen, as the weight was.
            set_flag(parameter, flags.get((id(module), name), False))
        for (module, name, now), dtype, (tensor, data, flag, grad) in zip(
            undo.values, self.dtypes, self.values, strict=True
        ):
            # Follow the base if it was moved to another device or cast to another dtype.
            to: dict[str, Any] = {
                "device": now.device,
                "dtype": data.dtype if now.dtype == dtype else now.dtype,
            }
            tensor.grad = None  # must have the dtype of its tensor
            tensor = with_data(tensor, data.to(**to))
            tensor.grad = None if grad is None else grad.to(**to)
            set_flag(tensor, flag)
            held(module, name)[name] = tensor
        for module, flags in self.held:
            vars(module).setdefault(HELD, flags)
        hold_flags(self.network)


def _replaced(
    undos: list[ModuleUndo], changes: list[ModuleUndo]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs of a module of the base and the new module in its place."""
    for undo, change in zip(undos, changes, strict=True):
        for name, base in undo.entries.get("_modules", {}).items():
            new = change.entries["_modules"][name]
            if isinstance(base, nn.Module) and isinstance(new, nn.Module):
                yield base, new


class _Frame:
    """The parts of one module that `ModuleUndo` leaves out: its class, and what gift added."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.spec = spec_of(module)  # not the class, which pickle cannot find by name
        # Include adapted tensors in ``__dict__``: a hook computed these.
        keys = [key for key in (*OWN, *weight_deltas(module)) if key in module.__dict__]
        self.own = {key: module.__dict__[key] for key in keys}
        self.parameters = dict(module._parameters)
        self.buffers = dict(module._buffers)
        self.hooks = dict(module._load_state_dict_post_hooks)
        self.not_saved = set(module._non_persistent_buffers_set)
        self.place = _place_of_base(module)
        self.added = [
            p for n in added_names(module) if (p := module._parameters.get(n)) is not None
        ]

    def apply(self, shared: dict[int, Tensor]) -> None:
        """Put the parts back.

        Args:
            shared: buffers that were moved or cast so far, by the id of the buffer before.
        """
        module = self.module
        set_class(module, generated_class(plain_class(type(module)), self.spec))
        # A hook that computed a tensor may be gone.
        own = {k: v for k, v in self.own.items() if k in OWN or k in module.__dict__}
        module.__dict__.update(own)
        if spec_of(module).statistics:  # freeze them again, remember the requested mode
            module.__dict__["_gift_mode"] = module.training
            module.training = False
        device, dtype = _place_of_base(module)
        # Base tensors stay as they are now. If they were moved or cast, the deltas follow.
        added = added_names(module)
        _put_among(module._parameters, self.parameters, added)
        _put_among(module._buffers, self.buffers, added)
        _put_among(module._load_state_dict_post_hooks, self.hooks, self.hooks)
        for name in added if device is not None else ():
            delta = held(module, name)[name]
            cast = dtype != self.place[1] and delta.is_floating_point()
            data = delta.data.to(device=device, dtype=dtype if cast else None)
            if data is not delta.data and (delta.device, delta.dtype) != (data.device, data.dtype):
                delta.grad = None  # must have the dtype of its tensor
                # Layers of other networks may share a buffer; it stays as it is for them.
                held(module, name)[name] = (
                    with_data(delta, data)
                    if isinstance(delta, nn.Parameter)
                    else shared.setdefault(id(delta), data)
                )
        module._non_persistent_buffers_set.update(self.not_saved)


def _place_of_base(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device of the module's own tensors, and dtype of its first floating-point one."""
    added = added_names(module)
    named = [*module._parameters.items(), *module._buffers.items()]
    own = [tensor for name, tensor in named if tensor is not None and name not in added]
    dtypes = (tensor.dtype for tensor in own if tensor.is_floating_point())
    return next((tensor.device for tensor in own), None), next(dtypes, None)


def _put_among(now: dict[Any, Any], then: dict[Any, Any], names: Container[Any]) -> None:
    """Restore the entries of `then` with these names in `now`, and the order of `then`."""
    present = {**now}
    now.clear()
    for key, value in then.items():
        if key in present or key in names:
            now[key] = present.pop(key, value)
    now.update(present)


def _unparametrized(cls: type) -> type:
    """The class without the subclass that torch generates for a parametrized module."""
    return cls.__base__ if is_parametrized(cls) else cls  # type: ignore[return-value]


@switching
def disabled(net: nn.Module) -> Iterator[nn.Module]:
    """Context in which the network is the base with all parameters frozen, for comparison.

    After the context, the network is the same as before, bit for bit, gradients and modes included.
    Changes made to the base inside the context stay in the base. Fine-tuning that is enabled inside
    the context is disabled at its end.

    Args:
        net: a network that is being fine-tuned.

    Raises:
        RuntimeError: if it is not being fine-tuned, or its base was not kept.

    Example:
        >>> import gift, torch
        >>> from torch import nn
        >>> net, x = nn.Linear(64, 10), torch.randn(2, 64)
        >>> before = net(x)
        >>> report = gift.enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy())
        >>> _ = nn.init.normal_(net.lora_B)  # in the place of training
        >>> with gift.disabled(net):
        ...     torch.equal(net(x), before)
        True
        >>> torch.equal(net(x), before)
        False
    """
    with kept_modes(net), _disabled(net):
        yield net


@contextmanager
def _disabled(net: nn.Module) -> Iterator[None]:
    gradients = [(p, p.grad) for p in nn.Module.parameters(net)]
    before = {module: _own_names(module) for module in net.modules()}
    with transaction(net):
        detached = UnloadedDelta(net)
        for parameter, _ in gradients:
            parameter.grad = None  # an optimizer skips parameters without gradient
        frozen = [(m, name, p, p.requires_grad) for m, name, p in _parameters(net)]
        for _, _, parameter, _ in frozen:
            parameter.requires_grad = False

    def put_back() -> None:
        with transaction(net):
            for part in [part for part in net.modules() if spec_of(part).network]:
                remove_record(part).undo.apply(part)  # fine-tuning enabled inside the context
            for module, name, parameter, flag in frozen:
                now = module._parameters.get(name)  # a new one after load_state_dict(assign=True)
                (parameter if now is None else now).requires_grad = flag
            detached.attach()
            for parameter, gradient in gradients:
                parameter.grad = None if gradient is None else gradient.to(parameter)

    try:
        with meanwhile([net], "disabled"), as_packed(p for *_, p, _ in frozen):
            yield
    finally:
        completed(put_back)
    if names := list(_new_parameters(net, before)):
        warnings.warn(
            f"{some(names)} joined the network while it was disabled, and use no delta: a layer "
            "that is fused from layers of the base computes what the base computes. Fuse within "
            "gift.merged(network), or call gift.merge(network) first",
            GiftWarning,
            stacklevel=5,
        )


def _own_names(module: nn.Module) -> set[str]:
    """The names of the parameters of a module itself."""
    return {name for name, p in module._parameters.items() if p is not None}


def _new_parameters(net: nn.Module, before: dict[nn.Module, set[str]]) -> Iterator[str]:
    """Names of the parameters that were added, but not of those that replaced others.

    A weight norm and the like compute a parameter from others, which replace it.

    Args:
        net: the network.
        before: the names of the parameters that each module had.
    """
    for path, module in net.named_modules():
        names, known = _own_names(module), before.get(module, set())
        if known <= names and "parametrizations" not in path.split("."):
            yield from (joined(path, name) for name in sorted(names - known))


def _parameters(net: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter
