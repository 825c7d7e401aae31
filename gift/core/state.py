"""The state of a fine-tuned network: what is in it, and loading one completely or not at all."""

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Collection, Container, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import named_deltas, settings_of
from gift.core.dynamic_class import (
    plain_class,
    spec_of,
)
from gift.core.movers import needs_all, refuse_offloaded
from gift.core.record import NetworkRecord, record_of
from gift.core.state_settings import without_settings
from gift.core.trained import delta_names, frozen_names, named_trainable, trained_tensors
from gift.core.undo.copy_on_write import memory_of
from gift.core.undo.snapshot import transaction
from gift.core.weights.record import weight_deltas
from gift.core.weights.sharing import share_parameters
from gift.private.torch.calls import callers, loads_strictly
from gift.quantization import quant_state_names


def left_in_state(network: nn.Module) -> Collection[str]:
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


def overrides(network: nn.Module, name: str) -> bool:
    """Whether the network's author overrides this method of `nn.Module`."""
    return getattr(plain_class(type(network)), name) is not getattr(nn.Module, name)


def drop_names(
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


def drop_frozen(network: nn.Module, state: MutableMapping[str, Any]) -> None:
    """Drop frozen tensors to which the network's author gave other names."""
    trained = {id(p) for _, p in named_trainable(network)}
    frozen = {memory_of(p) for p in nn.Module.parameters(network) if id(p) not in trained}
    frozen -= {memory_of(p) for p in nn.Module.parameters(network) if id(p) in trained}
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and memory_of(value) in frozen:
            del state[key]


def complete(
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


def describe_deltas(network: nn.Module, state: Any, prefix: str) -> None:
    """Store the settings with which each delta was trained in the metadata of the state."""
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        for path, module in network.named_modules():
            if settings := settings_of(module):
                metadata.setdefault((prefix + path).rstrip("."), {})["gift"] = settings


def whole_state(network: nn.Module) -> dict[str, Any]:
    """The whole state of a network, frozen parameters included, without settings of deltas."""
    state = nn.Module.state_dict(network)
    if spec_of(network).network:
        complete(network, state, "", False)
    return without_settings(state)


def own_state(network: nn.Module) -> dict[str, Any]:
    """The result of ``state_dict()`` under torch's names, even if the author renames tensors."""
    state = nn.Module.state_dict(network)
    drop_names(network, state, "")
    complete(network, state, "", False)
    describe_deltas(network, state, "")
    return state


def load_own_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the result of `own_state` with torch's own code.

    Raises:
        RuntimeError: as ``load_state_dict``.
    """
    load_in_transaction(
        network, functools.partial(nn.Module.load_state_dict, network), (state,), {}, True
    )


def load_in_transaction(
    network: nn.Module, load: Any, args: tuple[Any, ...], kwargs: Any, strict: bool
) -> Any:
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
    with transaction(network, writes=overwritten(network, args, kwargs)):
        record.strict = strict
        result = load(*args, **kwargs)
        record.strict = True
    return result


@contextmanager
def loading_at_once(
    network: nn.Module, state: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Iterator[None]:
    """Load a state of a network whose parts a bigger module is about to load one by one.

    Args:
        network: the network.
        state: its part of the state, by its own names.
        metadata: what torch gives to `_load_from_state_dict`.

    Raises:
        RuntimeError: as ``load_state_dict``; nothing is loaded then.
    """
    record = record_of(network)
    assign = metadata.get("assign_to_params_buffers", False)
    with transaction(network, writes=overwritten(network, (state,), {})):
        yield
        record.rehearsing = True  # the caller has checked the state
        try:
            nn.Module.load_state_dict(network, OrderedDict(state), strict=False, assign=assign)
        finally:
            record.rehearsing = False


def overwritten(
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
    yield from found.values()


def arguments_by_name(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
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
        if not overrides(network, "load_state_dict"):
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
    if overrides(network, "load_state_dict"):  # the author may rename tensors
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


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) and not is_lazy(value) else None


def after_loading(network: nn.Module, incompatible: Any) -> None:
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
    if record.shares and not record.rehearsing:
        share_parameters(network)  # `assign=True` has put other tensors into each module
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
                weight_deltas(module)[key].rederive(module, key)  # a computed tensor


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
