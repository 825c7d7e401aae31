"""Remove fine-tuning from a network and put it back later."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import held
from gift.core.dynamic_class import (
    Spec,
    joined,
    plain_class,
    spec_of,
)
from gift.core.frozen_base import HELD, hold_flags
from gift.core.frozen_norms import kept_modes
from gift.core.holders import refuse_held_elsewhere
from gift.core.network import remove_record
from gift.core.record import record_of
from gift.core.undo.frames import Below, Frame
from gift.core.undo.snapshot import transaction
from gift.core.undo.temporary_state import meanwhile
from gift.core.undo.undo import ModuleUndo, completed, place_of, tensor_of
from gift.core.undo.undoable import check_undoable
from gift.core.weights.mixin import is_parametrized
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
        self.frames = [Frame(m) for m in network.modules() if spec_of(m) != Spec()]
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
        self.base_record = record_of(network) if spec_of(network).network else None
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
        if undo.below is not None:
            undo.below = Below(self.network)
            remove_record(self.network)
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
                while spec_of(part).network and record_of(part) is not detached.base_record:
                    remove_record(part).undo.apply(part)  # was enabled inside the context
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
