"""The methods of a network that is being fine-tuned: it shows only its trained parameters."""

import warnings
from collections.abc import Iterable, Iterator, MutableMapping, Set
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gift.core.dynamic_class import (
    Generated,
    Spec,
    change_class,
)
from gift.core.frozen_base import hold_flags, release_flags, warn_unfrozen, watch
from gift.core.incoming_state import Incoming
from gift.core.record import NetworkRecord
from gift.core.save_pretrained import parts_that_save, saving_methods
from gift.core.state import (
    after_loading,
    arguments_by_name,
    complete,
    describe_deltas,
    drop_frozen,
    drop_names,
    left_in_state,
    load_in_transaction,
    loading_at_once,
    overrides,
    overwritten,
    whole_state,
)
from gift.core.trained import delta_names, frozen_names, named_trainable
from gift.core.undo.snapshot import Snapshot
from gift.core.unfreeze import keep_values
from gift.core.weights.sharing import place_parts, share_parameters
from gift.errors import GiftWarning
from gift.private.torch.calls import callers


class FineTunedNetwork(Generated):
    """Mixin of the network that was passed to `enable_fine_tuning`."""

    _gift_network: NetworkRecord

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; before a training step, check that its base is still frozen."""
        if torch.is_grad_enabled():
            warn_unfrozen(self)
        if not self._gift_network.shares or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        waits = share_parameters(self)
        result = super().__call__(*args, **kwargs)
        if waits:  # lazy modules have shapes now
            share_parameters(self)
            place_parts(self)
        return result

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        watch(self)

    def _gift_copied(self) -> None:
        watch(self)
        if after_loading not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(after_loading)

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """The trained parameters; ``named_parameters()`` gives all.

        They include frozen parameters of the base whose ``requires_grad`` was set since. A warning
        reports these.
        """
        if not self._gift_network.only_trainable_parameters or _is_averaging():
            return super().parameters(*args, **kwargs)
        warn_unfrozen(self)
        if overrides(self, "parameters"):
            return _trained_among(self, super().parameters(*args, **kwargs))
        return (p for _, p in named_trainable(self, *args, **kwargs))

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # Move each buffer once, so that buffers which layers share stay shared.
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Any:
            if isinstance(tensor, nn.Parameter):
                return fn(tensor)
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, fn(tensor)
            return moved[id(tensor)][1]

        result = super()._apply(once, *args, **kwargs)
        if self._gift_network.shares:
            share_parameters(self)
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters and the persistent buffers, under any prefix."""
        state = super().state_dict(*args, **kwargs)
        if not isinstance(state, MutableMapping):  # an author's own format
            return state
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if self._gift_network.only_trainable_state:
            left = left_in_state(self)
            drop_names(self, state, prefix, left)
            if not left and overrides(self, "state_dict"):
                drop_frozen(self, state)
        complete(self, state, prefix, kwargs.get("keep_vars", args[2] if len(args) > 2 else False))
        describe_deltas(self, state, prefix)
        return state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load trained parameters and buffers, or a whole checkpoint of the base.

        If a bigger module contains the network, torch's own code loads it. That code continues
        after an error and raises at the end. If something is wrong with the part of the state that
        is for this network, nothing of that part is loaded. What other parts of the bigger module
        have loaded stays, as always in torch. The whole part is loaded at once, while signals wait,
        before torch writes the same values again, one module after the other.

        Raises:
            RuntimeError: naming every key that is missing, unknown, of another shape, or trained
                with other settings; nothing is loaded then.
        """
        strict = bool(arguments_by_name(self, args, kwargs).get("strict", True))
        return load_in_transaction(self, super().load_state_dict, args, kwargs, strict)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        # A bigger module that loads its state calls this method directly, not `load_state_dict`.
        keys: Set[str] = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        record = self._gift_network
        record.loading, record.refusing, record.before = (prefix, keys), False, None
        if not record.rehearsing:
            coming = {key: state_dict[prefix + key] for key in keys}
            frozen, deltas = set(frozen_names(self)), delta_names(self)
            *_, errors = rest
            incoming = Incoming(
                self,
                coming,
                whole_state(self),
                frozen,
                deltas,
                record.chosen,
                record.strict,
                prefix,
            )
            if problems := list(incoming.problems()):
                errors += [f"{problem}. Nothing of it was loaded" for problem in problems]
                record.refusing = True
                for key in keys:  # leave nothing that a submodule could load
                    del state_dict[prefix + key]
                return
            for surprise in incoming.surprises():
                warnings.warn(surprise, GiftWarning, stacklevel=2)
            if prefix:  # a bigger module loads, without a transaction
                snapshot = Snapshot(self, writes=overwritten(self, (coming,), {}))
                with suppress(RuntimeError), loading_at_once(self, coming, rest[0]):
                    keep_values(self, coming, frozen, deltas)
                record.loading, record.before = (prefix, keys), (snapshot, errors, len(errors))
            keep_values(self, coming, frozen, deltas)  # none that was kept is kept again
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _is_averaging() -> bool:
    """Whether the caller is `AveragedModel`, which needs all parameters.

    It pairs them by their order with all parameters of its copy, so the trained parameters alone
    would be averaged into others.
    """
    if torch.compiler.is_compiling():
        return False
    asking = next((frame for frame in callers() if not _is_own(frame)), None)
    return asking is not None and asking.f_code is AveragedModel.update_parameters.__code__


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("gift.")


def _trained_among(network: nn.Module, given: Iterable[Any]) -> Iterator[Any]:
    """The author's ``parameters()`` without the frozen ones, then the trained ones it left out."""
    trained = {id(p): p for _, p in named_trainable(network)}
    frozen = {id(p) for p in nn.Module.parameters(network)} - trained.keys()
    for one in given:
        trained.pop(id(one), None)
        if id(one) not in frozen:
            yield one
    yield from trained.values()


def feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Let a network show only its trained parameters."""
    if not spec.network:
        return [], {}
    readers = {name: getattr(plain, name, None) for name in ("dtype", "device")}
    namespace: dict[str, Any] = {
        name: _of_the_base(reader)
        for name, reader in readers.items()
        if isinstance(reader, property)
    }
    if hasattr(plain, "resize_token_embeddings"):
        namespace["resize_token_embeddings"] = _refuse_to_resize
    namespace |= saving_methods(plain)
    return [FineTunedNetwork], namespace


class _Whole:
    """View of a network in which ``parameters()`` gives all parameters."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return nn.Module.parameters(self._network, recurse)


def _of_the_base(reader: property) -> property:
    """Let ``model.dtype`` and ``model.device`` of transformers read the base.

    They look at the first of ``parameters()``. During fine-tuning that is a delta, which may have
    another dtype, or there is none.
    """
    assert reader.fget is not None
    read = reader.fget
    return property(lambda self: read(_Whole(self)), reader.fset, reader.fdel, reader.__doc__)


def _refuse_to_resize(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    # transformers would write the new rows into the effective weight, which is recomputed each
    # time.
    raise RuntimeError("resize the token embeddings before enable_fine_tuning, not after")


def install_record(network: nn.Module, record: NetworkRecord) -> None:
    """Attach the record to `network`, which then shows only its trained parameters."""
    network.__dict__["_gift_network"] = record
    change_class(network, network=True)
    for part in parts_that_save(network):
        change_class(part, part=True)
    hold_flags(network)
    network.register_load_state_dict_post_hook(after_loading)


def remove_record(network: nn.Module) -> NetworkRecord:
    """Undo `install_record` and return the record."""
    record: NetworkRecord = network.__dict__.pop("_gift_network")
    network.__dict__.pop("_gift_schedule", None)
    release_flags(network)
    change_class(network, network=False)
    for part in parts_that_save(network):
        change_class(part, part=False)
    for key, hook in list(network._load_state_dict_post_hooks.items()):
        if hook is after_loading:
            del network._load_state_dict_post_hooks[key]
    return record
