"""What a network gains while it is being fine-tuned: it shows its trained parameters only."""

import functools
import inspect
import itertools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from gift.adapter import adapters_of
from gift.delta import added_names, named_deltas, settings_of
from gift.errors import GiftWarning
from gift.frozen import HeldFlags, hold_flags, release_flags, tell_unfrozen, watch
from gift.generated import Generated, Spec, change_class, contributes, joined, plain_class, spec_of
from gift.guard import memory_of
from gift.in_place import keep_values
from gift.incoming import Incoming
from gift.movers import needs_all, refuse_offloaded
from gift.pretrained import parts_that_save, saving_methods
from gift.private.torch import callers, loads_strictly
from gift.quantised import quant_state_names
from gift.report import Report
from gift.state_settings import without_settings
from gift.transaction import Snapshot, Undo, transaction


@dataclass
class NetworkRecord:
    """What fine-tuning keeps on the network.

    Args:
        chosen: names of the parameters that the strategy left trainable. They stay chosen while
            somebody freezes them for a while.
        report: what the strategy did.
        undo: the way back.
        late: those among them that were chosen later, see `gift.in_place`.
        waiting: those that stay frozen until they are due, whatever ``requires_grad_`` says.
        held: what keeps frozen parameters frozen, module by module.
        told_unfrozen: whether somebody was warned that flags of them were set.
        keeps_base: whether the way back has the values of what is trained in place.
        only_trainable_parameters: whether ``parameters()`` gives trained parameters only.
        only_trainable_state: whether ``state_dict()`` gives these and buffers only.
        recipe: the strategy as plain data, None where a file cannot name it.
        loading: of the state that is being loaded, the prefix and the keys.
        rehearsing: whether that is only tried.
        refusing: whether nothing of it is loaded.
        strict: whether missing keys are errors, as far as that is known: torch does not tell parts
            of a bigger module.
        before: what the network was before a bigger module began to load it, torch's list of
            errors, and how many there were.
    """

    chosen: set[str]
    report: Report
    undo: Undo
    late: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    held: list[HeldFlags] = field(default_factory=list)
    told_unfrozen: bool = False
    keeps_base: bool = True
    only_trainable_parameters: bool = True
    only_trainable_state: bool = True
    recipe: dict[str, Any] | None = None
    loading: tuple[str, Set[str]] = ("", frozenset())
    rehearsing: bool = False
    refusing: bool = False
    strict: bool = True
    before: tuple[Snapshot, list[str], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"before": None}


class FineTunedNetwork(Generated):
    """Methods of the network that was given to `enable_fine_tuning`."""

    _gift_network: NetworkRecord

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; before a training step it is seen whether its base is still frozen."""
        if torch.is_grad_enabled():
            tell_unfrozen(self)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        watch(self)  # type: ignore[arg-type]

    def _gift_copied(self) -> None:
        watch(self)  # type: ignore[arg-type]
        if _loaded not in self._load_state_dict_post_hooks.values():  # type: ignore[attr-defined]
            self.register_load_state_dict_post_hook(_loaded)  # type: ignore[attr-defined]

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """The trained parameters; ``named_parameters()`` gives all.

        Among them are those of the base of which somebody has set the flag since, with a warning.
        """
        if not self._gift_network.only_trainable_parameters or _is_averaging():
            return super().parameters(*args, **kwargs)  # type: ignore[misc]
        tell_unfrozen(self)
        if _overrides(self, "parameters"):
            return _trained_among(self, super().parameters(*args, **kwargs))  # type: ignore[misc]
        return (p for _, p in named_trainable(self, *args, **kwargs))  # type: ignore[arg-type]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # Buffers that layers share stay shared where they are moved.
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Tensor:
            if isinstance(tensor, nn.Parameter):
                return fn(tensor)
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, fn(tensor)
            return moved[id(tensor)][1]

        return super()._apply(once, *args, **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters and the persistent buffers, under any prefix."""
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(state, MutableMapping):  # which only its author understands
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

        A bigger module that contains the network loads it by torch's own code, which goes on after
        an error and raises at the end. If something is wrong with what is for this network, nothing
        of it is loaded. What other parts of the bigger module have loaded stays, as torch does it;
        and a signal, or an error that a module's own code raises, cannot be caught there: load into
        the network itself where that matters.

        Raises:
            RuntimeError: naming every key that is missing, unknown, of another shape, or trained
                with other settings; nothing is loaded then.
        """
        strict = bool(_given(self, args, kwargs).get("strict", True))
        return _load(self, super().load_state_dict, args, kwargs, strict)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Also called when a bigger module loads its state, which passes `load_state_dict` by.
        keys: Set[str] = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        record = self._gift_network
        record.loading, record.refusing, record.before = (prefix, keys), False, None
        if not record.rehearsing:
            coming = {key: state_dict[prefix + key] for key in keys}
            frozen, deltas = set(frozen_names(self)), delta_names(self)
            *_, errors = rest
            incoming = Incoming(
                self,  # type: ignore[arg-type]
                coming,
                whole_state(self),  # type: ignore[arg-type]
                frozen,
                deltas,
                record.chosen,
                record.strict,
                prefix,
            )
            if problems := list(incoming.problems()):
                errors += [f"{problem}. Nothing of it was loaded" for problem in problems]
                record.refusing = True
                for key in keys:  # so that no part of the network finds anything to load
                    del state_dict[prefix + key]
                return
            for surprise in incoming.surprises():
                warnings.warn(surprise, GiftWarning, stacklevel=2)
            if prefix:  # a bigger module loads, within no transaction
                snapshot = Snapshot(self, writes=_overwritten(self, (coming,), {}))  # type: ignore[arg-type]
                record.before = snapshot, errors, len(errors)
            keep_values(self, coming, frozen, deltas)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


def _is_averaging() -> bool:
    """Whether `AveragedModel` asks, which pairs what it gets with all parameters of its copy.

    It goes by their order alone, so the trained ones would be averaged into others.
    """
    if torch.compiler.is_compiling():
        return False
    asking = next(itertools.islice(callers(), 1, None), None)
    return asking is not None and asking.f_code is AveragedModel.update_parameters.__code__


def _left_in_state(network: Any) -> Collection[str]:
    """Names of frozen parameters that whoever asks for the state needs in there."""
    if torch.compiler.is_compiling():
        return ()
    if needs_all(network):
        return frozen_names(network)
    return dict(nn.Module.named_parameters(network)) if _drops_frozen_itself() else ()


def _drops_frozen_itself() -> bool:
    """Whether `torch.distributed.checkpoint` asks with ``ignore_frozen_params``.

    It takes each frozen parameter out of the state by its first name, and it must be in there.
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


def _overrides(network: Any, name: str) -> bool:
    """Whether the author of a network has a method of that name instead of torch's."""
    return getattr(plain_class(type(network)), name) is not getattr(nn.Module, name)


def _trained_among(network: Any, given: Iterable[Any]) -> Iterator[Any]:
    """What the author's ``parameters()`` gives, but for what is frozen; then what it left out."""
    trained = {id(p): p for _, p in named_trainable(network)}
    frozen = {id(p) for p in nn.Module.parameters(network)} - trained.keys()
    for one in given:
        trained.pop(id(one), None)
        if id(one) not in frozen:
            yield one
    yield from trained.values()


def _drop_names(
    network: Any, state: MutableMapping[str, Any], prefix: str, left: Container[str] = ()
) -> None:
    """Drop what is frozen, and what belongs to quantised tensors, by torch's names.

    But for the names that are to be `left`.
    """
    for name in (*frozen_names(network), *quant_state_names(network)):
        if name not in left:
            state.pop(prefix + name, None)


def _drop_frozen(network: Any, state: MutableMapping[str, Any]) -> None:
    """Drop frozen tensors to which the author of a network gave other names."""
    trained = {id(p) for _, p in named_trainable(network)}
    frozen = {memory_of(p) for p in nn.Module.parameters(network) if id(p) not in trained}
    frozen -= {memory_of(p) for p in nn.Module.parameters(network) if id(p) in trained}
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and memory_of(value) in frozen:
            del state[key]


def _complete(network: Any, state: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
    """Add what is trained and is not in a state under any name, as an author's code left it out."""
    wanted = trained_tensors(network)
    missing = {name: t for name, t in wanted.items() if prefix + name not in state}
    if missing:
        there = {memory_of(value) for value in state.values() if isinstance(value, Tensor)}
        for name, tensor in missing.items():
            if memory_of(tensor) not in there:
                state[prefix + name] = tensor if keep_vars else tensor.detach()


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """All that a state of a fine-tuned network must have: trained parameters, persistent buffers of
    methods; tied ones under their first name.
    """
    wanted: dict[str, Tensor] = dict(named_trainable(network))
    for path, module in network.named_modules():
        for name in added_names(module):
            tensor = module._buffers.get(name)
            if tensor is not None and name not in module._non_persistent_buffers_set:
                wanted[joined(path, name)] = tensor
    return wanted


def own_state(network: Any) -> dict[str, Any]:
    """What ``state_dict()`` gives, by torch's names whatever names the author has for it."""
    state = nn.Module.state_dict(network)
    _drop_names(network, state, "")
    _complete(network, state, "", False)
    _describe_deltas(network, state, "")
    return state


def load_own_state(network: Any, state: Mapping[str, Any]) -> None:
    """Load what `own_state` gave, by torch's own code.

    Raises:
        RuntimeError: as ``load_state_dict``.
    """
    _load(network, functools.partial(nn.Module.load_state_dict, network), (state,), {}, True)


def _load(network: Any, load: Any, args: tuple[Any, ...], kwargs: Any, strict: bool) -> Any:
    """Call `load` once to see whether it can be done, and then to do it."""
    refuse_offloaded(network)
    record: NetworkRecord = network._gift_network
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


def _overwritten(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of a network that a state has, and those that are made from these."""
    given = {
        key for state in (*args, *kwargs.values()) if isinstance(state, Mapping) for key in state
    }
    named = [*nn.Module.named_parameters(network, remove_duplicate=False),
             *network.named_buffers(remove_duplicate=False)]  # fmt: skip
    known, deltas = {name for name, _ in named}, delta_names(network)
    everything = not given <= known  # the author of a network may have other names for them
    found = {id(t): t for name, t in named if everything or name in given or name in deltas}
    yield from (tensor for tensor in found.values() if not is_lazy(tensor))


def _given(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``load_state_dict`` by the names that the author of a network gave them."""
    load: Any = plain_class(type(network)).load_state_dict  # type: ignore[attr-defined]
    try:
        bound = inspect.signature(load).bind(network, *args, **kwargs)
    except TypeError:
        return kwargs  # the call will tell what is wrong with it
    variable = (p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD)
    return dict(bound.arguments) | bound.arguments.get(next(variable, ""), {})


def _rehearse(network: Any, load: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call `load` with the network's own values in the place of those in the state.

    Never with ``assign=True``, which would put those into it.
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


def _rehearsal(network: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state with the network's own values: loading it tells all that is wrong with the keys and
    shapes, in torch's own way with its hooks and old versions, and changes nothing.
    """
    if not isinstance(state_dict, Mapping):
        return state_dict  # torch says what it expected
    own = whole_state(network)
    if _overrides(network, "load_state_dict"):  # which may know the tensors by other names
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
    """All that the state of a network has, frozen parameters too, without settings of deltas."""
    state = nn.Module.state_dict(network)
    if spec_of(network).network:
        _complete(network, state, "", False)
    return without_settings(state)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) and not is_lazy(value) else None


def _loaded(network: Any, incompatible: Any) -> None:
    """Hook after loading: what a saved delta rightly lacks is not missing, and a new base is the
    base from then on.
    """
    record: NetworkRecord = network._gift_network
    prefix, keys = record.loading
    if record.refusing:  # there is an error already
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
            elif key in adapters_of(module) and key not in module._parameters:
                adapters_of(module)[key].follow(module, key)  # a tensor that is computed


def _undone(record: NetworkRecord, misfits: list[str]) -> bool:
    """Whether a bigger module found errors in what it loaded, of which nothing is left then."""
    if record.before is None:
        return False
    snapshot, errors, count = record.before
    record.before = None
    prefix = record.loading[0]
    wrong = loads_strictly() and any(key.startswith(prefix) for key in misfits)
    if len(errors) == count and not wrong:
        return False
    snapshot.rollback()
    errors.append(f"nothing was loaded into {prefix.removesuffix('.')}")
    return True


@contributes
def _network_parts(plain: type, spec: Spec) -> tuple[list[type], dict[str, Any]]:
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
    """A network as it was: its ``parameters()`` are all of them."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return nn.Module.parameters(self._network, recurse)


def _of_the_base(reader: property) -> property:
    """`model.dtype` and `model.device` of transformers read ``parameters()``, whose first is now a
    delta, of another dtype perhaps, or missing.
    """
    assert reader.fget is not None
    read = reader.fget
    return property(lambda self: read(_Whole(self)), reader.fset, reader.fdel, reader.__doc__)


def _refuse_to_resize(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    # transformers would write the new rows into the effective weight, which is made anew each time.
    raise RuntimeError("resize the token embeddings before enable_fine_tuning, not after")


def named_trainable(network: nn.Module, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained: chosen by the strategy, or unfrozen since."""
    record = network.__dict__.get("_gift_network")
    chosen = record.chosen if record is not None else ()
    for name, parameter in nn.Module.named_parameters(network, recurse=recurse):
        if parameter.requires_grad or name in chosen:
            yield name, parameter


def trained_in_place(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the network's own that are trained."""
    deltas = delta_names(network)
    return ((name, p) for name, p in named_trainable(network) if name not in deltas)


def moved_buffers(network: Any) -> Iterator[str]:
    """Names of buffers that changed since enabling; all where that is not known.

    Of those that are saved, and that no method added. Another dtype or device is no change.
    """
    undo: Undo = network._gift_network.undo
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
    if buffer.is_meta or before.is_meta:  # there is no value, or was none when it was kept
        return False
    return buffer.shape == before.shape and torch.equal(buffer, before.to(buffer))


def frozen_names(network: Any) -> list[str]:
    """Names of the parameters that are not trained, including the second names of tied ones."""
    chosen = network._gift_network.chosen
    return [
        name
        for name, p in nn.Module.named_parameters(network, remove_duplicate=False)
        if not p.requires_grad and name not in chosen
    ]


def delta_names(network: Any) -> set[str]:
    """Names of the parameters and buffers that methods added."""
    return {
        joined(path, name)
        for path, module in network.named_modules()
        for name in added_names(module)
    }


def _describe_deltas(network: Any, state: Any, prefix: str) -> None:
    """Say in the state's metadata with which settings each delta was trained."""
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        for path, module in network.named_modules():
            if settings := settings_of(module):
                metadata.setdefault((prefix + path).rstrip("."), {})["gift"] = settings


def install_record(network: nn.Module, record: NetworkRecord) -> None:
    """Make `network` show its trained parameters only."""
    network.__dict__["_gift_network"] = record
    change_class(network, network=True)
    for part in parts_that_save(network):
        change_class(part, part=True)
    hold_flags(network)
    network.register_load_state_dict_post_hook(_loaded)


def remove_record(network: nn.Module) -> NetworkRecord:
    """Undo `install_record`."""
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
