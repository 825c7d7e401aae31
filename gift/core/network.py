"""The methods of a network that is being fine-tuned: it shows only its trained parameters."""

import functools
import inspect
import itertools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, MutableMapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from gift.core.delta import added_names, named_deltas, settings_of
from gift.core.dynamic_class import (
    Generated,
    Spec,
    change_class,
    joined,
    plain_class,
    spec_of,
)
from gift.core.frozen_base import hold_flags, release_flags, tell_unfrozen, watch
from gift.core.incoming_state import Incoming
from gift.core.movers import needs_all, refuse_offloaded
from gift.core.record import NetworkRecord, record_of
from gift.core.save_pretrained import parts_that_save, saving_methods
from gift.core.state_settings import without_settings
from gift.core.undo.copy_on_write import memory_of
from gift.core.undo.snapshot import Snapshot, transaction
from gift.core.unfreeze import keep_values
from gift.core.weights.record import weight_deltas
from gift.errors import GiftWarning
from gift.private.torch import callers, loads_strictly
from gift.quantization import quant_state_names


class FineTunedNetwork(Generated):
    """Mixin of the network that was passed to `enable_fine_tuning`."""

    _gift_network: NetworkRecord

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; before a training step, check that its base is still frozen."""
        if torch.is_grad_enabled():
            tell_unfrozen(self)
        return super().__call__(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        watch(self)

    def _gift_copied(self) -> None:
        watch(self)
        if _loaded not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_loaded)

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """The trained parameters; ``named_parameters()`` gives all.

        They include frozen parameters of the base whose ``requires_grad`` was set since. A warning
        reports these.
        """
        if not self._gift_network.only_trainable_parameters or _is_averaging():
            return super().parameters(*args, **kwargs)
        tell_unfrozen(self)
        if _overrides(self, "parameters"):
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

        return super()._apply(once, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters and the persistent buffers, under any prefix."""
        state = super().state_dict(*args, **kwargs)
        if not isinstance(state, MutableMapping):  # an author's own format
            return state
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if self._gift_network.only_trainable_state:
            left = _left_in_state(self)
            _drop_names(self, state, prefix, left)
            if not left and _overrides(self, "state_dict"):
                _drop_frozen(self, state)
        _complete(self, state, prefix, kwargs.get("keep_vars", args[2] if len(args) > 2 else False))
        _describe_deltas(self, state, prefix)
        return state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load trained parameters and buffers, or a whole checkpoint of the base.

        If a bigger module contains the network, torch's own code loads it. That code continues
        after an error and raises at the end. If something is wrong with the part of the state that
        is for this network, nothing of that part is loaded. What other parts of the bigger module
        have loaded stays, as always in torch. A signal, or an exception from a module's own code,
        cannot be caught there. Load into the network itself where that matters.

        Raises:
            RuntimeError: naming every key that is missing, unknown, of another shape, or trained
                with other settings; nothing is loaded then.
        """
        strict = bool(_given(self, args, kwargs).get("strict", True))
        return _load(self, super().load_state_dict, args, kwargs, strict)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
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
                snapshot = Snapshot(self, writes=_overwritten(self, (coming,), {}))
                record.before = snapshot, errors, len(errors)
            keep_values(self, coming, frozen, deltas)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _is_averaging() -> bool:
    """Whether the caller is `AveragedModel`, which needs all parameters.

    It pairs them by their order with all parameters of its copy, so the trained parameters alone
    would be averaged into others.
    """
    if torch.compiler.is_compiling():
        return False
    asking = next(itertools.islice(callers(), 1, None), None)
    return asking is not None and asking.f_code is AveragedModel.update_parameters.__code__


def _left_in_state(network: nn.Module) -> Collection[str]:
    """Names of the frozen parameters that the caller of ``state_dict()`` needs in the state."""
    if torch.compiler.is_compiling():
        return ()
    if needs_all(network):
        return frozen_names(network)
    return dict(nn.Module.named_parameters(network)) if _drops_frozen_itself() else ()


def _drops_frozen_itself() -> bool:
    """Whether `torch.distributed.checkpoint` is the caller, with ``ignore_frozen_params``.

    It deletes each frozen parameter from the state by its first name, and fails if one is missing.
    """
    checkpoint = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if checkpoint is None:
        return False
    asking = {checkpoint.get_model_state_dict.__code__, checkpoint.get_state_dict.__code__}
    return any(
        getattr(frame.f_locals.get("options"), "ignore_frozen_params", False)
        for frame in callers()
        if frame.f_code in asking
    )


def _overrides(network: nn.Module, name: str) -> bool:
    """Whether the network's author overrides this method of `nn.Module`."""
    return getattr(plain_class(type(network)), name) is not getattr(nn.Module, name)


def _trained_among(network: nn.Module, given: Iterable[Any]) -> Iterator[Any]:
    """The author's ``parameters()`` without the frozen ones, then the trained ones it left out."""
    trained = {id(p): p for _, p in named_trainable(network)}
    frozen = {id(p) for p in nn.Module.parameters(network)} - trained.keys()
    for one in given:
        trained.pop(id(one), None)
        if id(one) not in frozen:
            yield one
    yield from trained.values()


def _drop_names(
    network: nn.Module, state: MutableMapping[str, Any], prefix: str, left: Container[str] = ()
) -> None:
    """Drop frozen parameters and quantization states from a state, by torch's names.

    Args:
        network: the network.
        state: the state, changed in place.
        prefix: what precedes the network's names in it.
        left: names that stay.
    """
    for name in (*frozen_names(network), *quant_state_names(network)):
        if name not in left:
            state.pop(prefix + name, None)


def _drop_frozen(network: nn.Module, state: MutableMapping[str, Any]) -> None:
    """Drop frozen tensors to which the network's author gave other names."""
    trained = {id(p) for _, p in named_trainable(network)}
    frozen = {memory_of(p) for p in nn.Module.parameters(network) if id(p) not in trained}
    frozen -= {memory_of(p) for p in nn.Module.parameters(network) if id(p) in trained}
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and memory_of(value) in frozen:
            del state[key]


def _complete(
    network: nn.Module, state: MutableMapping[str, Any], prefix: str, keep_vars: bool
) -> None:
    """Add the trained tensors that an author's ``state_dict`` left out under every name."""
    wanted = trained_tensors(network)
    missing = {name: t for name, t in wanted.items() if prefix + name not in state}
    if missing:
        there = {memory_of(value) for value in state.values() if isinstance(value, Tensor)}
        for name, tensor in missing.items():
            if memory_of(tensor) not in there:
                state[prefix + name] = tensor if keep_vars else tensor.detach()


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Everything that a state of a fine-tuned network must contain.

    These are the trained parameters and the persistent buffers of methods; a tied one has its first
    name.
    """
    wanted: dict[str, Tensor] = dict(named_trainable(network))
    for path, module in network.named_modules():
        for name in added_names(module):
            tensor = module._buffers.get(name)
            if tensor is not None and name not in module._non_persistent_buffers_set:
                wanted[joined(path, name)] = tensor
    return wanted


def own_state(network: nn.Module) -> dict[str, Any]:
    """The result of ``state_dict()`` under torch's names, even if the author renames tensors."""
    state = nn.Module.state_dict(network)
    _drop_names(network, state, "")
    _complete(network, state, "", False)
    _describe_deltas(network, state, "")
    return state


def load_own_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the result of `own_state` with torch's own code.

    Raises:
        RuntimeError: as ``load_state_dict``.
    """
    _load(network, functools.partial(nn.Module.load_state_dict, network), (state,), {}, True)


def _load(network: nn.Module, load: Any, args: tuple[Any, ...], kwargs: Any, strict: bool) -> Any:
    """Call `load` twice: a rehearsal that finds every error, then for real in a transaction."""
    refuse_offloaded(network)
    record = record_of(network)
    record.rehearsing = True
    try:
        _rehearse(network, load, args, kwargs)
    except RuntimeError as error:
        raise RuntimeError(f"nothing was loaded. {error}") from None
    finally:
        record.rehearsing = False
    with transaction(network, writes=_overwritten(network, args, kwargs)):
        record.strict = strict
        result = load(*args, **kwargs)
        record.strict = True
    return result


def _overwritten(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """The tensors of a network that loading a state writes to, deltas included."""
    given = {
        key for state in (*args, *kwargs.values()) if isinstance(state, Mapping) for key in state
    }
    named = [*nn.Module.named_parameters(network, remove_duplicate=False),
             *network.named_buffers(remove_duplicate=False)]  # fmt: skip
    known, deltas = {name for name, _ in named}, delta_names(network)
    everything = not given <= known  # the network's author may rename tensors
    found = {id(t): t for name, t in named if everything or name in given or name in deltas}
    yield from (tensor for tensor in found.values() if not is_lazy(tensor))


def _given(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``load_state_dict`` by the parameter names of the author's signature."""
    load: Any = plain_class(type(network)).load_state_dict
    try:
        bound = inspect.signature(load).bind(network, *args, **kwargs)
    except TypeError:
        return kwargs  # the call itself raises a clear error
    variable = (p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD)
    further: dict[str, Any] = bound.arguments.get(next(variable, ""), {})
    return dict(bound.arguments) | further


def _rehearse(network: nn.Module, load: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call `load` with the network's own values in place of those in the state.

    The rehearsal never passes ``assign=True``, which would put the tensors of the state into the
    network.
    """
    if args:
        args = (_rehearsal(network, args[0]), *args[1:])
        if not _overrides(network, "load_state_dict"):
            args = args[:2]
    else:
        kwargs = {
            key: _rehearsal(network, value) if isinstance(value, Mapping) else value
            for key, value in kwargs.items()
        }
    load(*args, **{key: value for key, value in kwargs.items() if key != "assign"})


def _rehearsal(network: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy of the state with the network's own values, to find errors without changing anything.

    Loading it reports everything that is wrong with keys and shapes, through torch's own code with
    its hooks and its handling of old versions.
    """
    if not isinstance(state_dict, Mapping):
        return state_dict  # torch raises an error that says what it expected
    own = whole_state(network)
    if _overrides(network, "load_state_dict"):  # the author may rename tensors
        theirs = network.state_dict()
        own |= theirs if isinstance(theirs, Mapping) else {}
    rehearsal = OrderedDict(state_dict)
    for key, value in rehearsal.items():
        mine = own.get(key)
        if (mine is not None and is_lazy(mine)) or (
            _shape(value) is not None and _shape(value) == _shape(mine)
        ):
            rehearsal[key] = mine
    if hasattr(state_dict, "_metadata"):
        rehearsal._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return rehearsal


def whole_state(network: nn.Module) -> dict[str, Any]:
    """The whole state of a network, frozen parameters included, without settings of deltas."""
    state = nn.Module.state_dict(network)
    if spec_of(network).network:
        _complete(network, state, "", False)
    return without_settings(state)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) and not is_lazy(value) else None


def _loaded(network: nn.Module, incompatible: Any) -> None:
    """Hook after loading: remove keys that may be absent from the missing keys, accept a new base.

    A saved delta has no frozen parameters, and a checkpoint of the base has no deltas. If a whole
    base was loaded, its values become those that `disable_fine_tuning` restores.
    """
    record = record_of(network)
    prefix, keys = record.loading
    if record.refusing:  # an error was reported already
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(prefix)]
        return
    frozen, deltas = set(frozen_names(network)), delta_names(network)
    is_base = bool(frozen & keys) and not deltas & keys
    absent = deltas if is_base else frozen
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.removeprefix(prefix) not in absent]
    if _undone(record, [*missing, *incompatible.unexpected_keys]):
        return
    if is_base and frozen <= keys and not record.rehearsing:
        record.undo.refresh_values()
        for module, key, delta in list(named_deltas(network)):
            if delta.is_on_meta(module):
                delta.reset(module, key)
            elif key in weight_deltas(module) and key not in module._parameters:
                weight_deltas(module)[key].follow(module, key)  # a computed tensor


def _undone(record: NetworkRecord, incompatibilities: list[str]) -> bool:
    """Roll back if a bigger module found errors while loading; return whether it did."""
    if record.before is None:
        return False
    snapshot, errors, count = record.before
    record.before = None
    prefix = record.loading[0]
    wrong = loads_strictly() and any(key.startswith(prefix) for key in incompatibilities)
    if len(errors) == count and not wrong:
        return False
    snapshot.rollback()
    errors.append(f"nothing was loaded into {prefix.removesuffix('.')}")
    return True


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


def named_trainable(network: nn.Module, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained: chosen by the strategy, or unfrozen later."""
    record = network.__dict__.get("_gift_network")
    chosen = record.chosen if record is not None else ()
    for name, parameter in nn.Module.named_parameters(network, recurse=recurse):
        if parameter.requires_grad or name in chosen:
            yield name, parameter


def trained_of_the_base(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the base that are trained, without deltas."""
    deltas = delta_names(network)
    return ((name, p) for name, p in named_trainable(network) if name not in deltas)


def moved_buffers(network: nn.Module) -> Iterator[str]:
    """Names of buffers whose values changed since enabling, or may have changed.

    Only persistent buffers that no method added count. Another dtype or device is not a change.
    """
    undo = record_of(network).undo
    before = {id(m._buffers[name]): value for m, name, value in undo.values if name in m._buffers}
    deltas = delta_names(network)
    for path, module in network.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            own = joined(path, name)
            if buffer is None or name in module._non_persistent_buffers_set or own in deltas:
                continue
            value = before.get(id(buffer))
            if value is None or not _same(buffer, value):
                yield own


def _same(buffer: Tensor, before: Tensor) -> bool:
    if buffer.is_meta or before.is_meta:  # no value now, or none when it was saved
        return False
    return buffer.shape == before.shape and torch.equal(buffer, before.to(buffer))


def frozen_names(network: nn.Module) -> list[str]:
    """Names of the parameters that are not trained, including every name of tied ones."""
    chosen = record_of(network).chosen
    return [
        name
        for name, p in nn.Module.named_parameters(network, remove_duplicate=False)
        if not p.requires_grad and name not in chosen
    ]


def delta_names(network: nn.Module) -> set[str]:
    """Names of the parameters and buffers that methods added."""
    return {
        joined(path, name)
        for path, module in network.named_modules()
        for name in added_names(module)
    }


def _describe_deltas(network: nn.Module, state: Any, prefix: str) -> None:
    """Store the settings with which each delta was trained in the metadata of the state."""
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        for path, module in network.named_modules():
            if settings := settings_of(module):
                metadata.setdefault((prefix + path).rstrip("."), {})["gift"] = settings


def install_record(network: nn.Module, record: NetworkRecord) -> None:
    """Attach the record to `network`, which then shows only its trained parameters."""
    network.__dict__["_gift_network"] = record
    change_class(network, network=True)
    for part in parts_that_save(network):
        change_class(part, part=True)
    hold_flags(network)
    network.register_load_state_dict_post_hook(_loaded)


def remove_record(network: nn.Module) -> NetworkRecord:
    """Undo `install_record` and return the record."""
    record: NetworkRecord = network.__dict__.pop("_gift_network")
    network.__dict__.pop("_gift_schedule", None)
    release_flags(network)
    change_class(network, network=False)
    for part in parts_that_save(network):
        change_class(part, part=False)
    for key, hook in list(network._load_state_dict_post_hooks.items()):
        if hook is _loaded:
            del network._load_state_dict_post_hooks[key]
    return record
