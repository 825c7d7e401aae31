"""Deltas: the tensors that fine-tuning added to a module, and their settings."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from gift.core.dynamic_class import Generated, Spec, bare, plain_class, set_class
from gift.core.state_settings import KEY, decoded, encoded
from gift.core.undo.containers import put_order
from gift.kernels.recomputed import Ways


@dataclass
class Delta:
    """Record of the tensors that a method added to a module.

    Args:
        names: maps the method's name of each tensor to its name on the module.
        owner: the module that holds the tensors if that is another one, None for the module itself.
        recompute_inputs: whether the module's inputs may be computed again in the backward pass.
        of_base: whether the delta is frozen and belongs to the base of the present strategy, which
            was enabled on top of it.
    """

    names: dict[str, str] = field(default_factory=dict)
    owner: nn.Module | None = field(default=None, kw_only=True)
    of_base: bool = field(default=False, kw_only=True)
    recompute_inputs: bool = field(default=True, kw_only=True, compare=False)
    _ways: Ways | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def ways(self) -> Ways | None:
        """What is known of the ways to the module's inputs; None if these are kept."""
        if not self.recompute_inputs or torch.compiler.is_compiling():
            return None
        if self._ways is None:
            self._ways = Ways()
        return self._ways

    def own_names(self) -> list[str]:
        """Names on the module of all tensors that it holds for this delta and those under it."""
        return list(self.names.values()) if self.owner is None else []

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors, by the method's names."""
        holder = module if self.owner is None else self.owner
        # `getattr` takes ten times as long.
        own: dict[str, Any] = {**holder._parameters, **holder._buffers}
        return {
            key: own[name] if name in own else getattr(holder, name)
            for key, name in self.names.items()
        }

    def is_on_meta(self, module: nn.Module) -> bool:
        """Whether `module` itself holds the tensors and they have no values yet."""
        return any(held(module, name)[name].is_meta for name in self.own_names())

    def reset(self, module: nn.Module, key: str) -> None:
        """Give the tensors their initial values, and a shape if they are still lazy."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which a saved delta must match this one; empty while unknown."""
        raise NotImplementedError

    @property
    def waits(self) -> bool:
        """Whether the delta means nothing before the network has run."""
        return False

    def hidden_settings(self, module: nn.Module, key: str) -> dict[str, Any]:
        """The settings that the names and shapes of the tensors do not show.

        Empty if all of them are the method's defaults for tensors of these shapes.
        """
        raise NotImplementedError

    def has_effect(self, module: nn.Module, key: str) -> bool:
        """Whether this delta changes what the network computes."""
        raise NotImplementedError


def deltas_of(module: nn.Module) -> dict[str, Delta]:
    """The deltas that `module` itself uses, by the name of what they change."""
    state = module.__dict__
    return {**state.get("_gift_weights", {}), **state.get("_gift_forwards", {})}


def present_deltas(module: nn.Module) -> dict[str, Delta]:
    """The deltas of the present strategy that `module` uses, without those of its base."""
    return {key: delta for key, delta in deltas_of(module).items() if not delta.of_base}


def added_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that methods added to `module` itself."""
    return [name for delta in deltas_of(module).values() for name in delta.own_names()]


def held(module: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary of `module` that holds its tensor `name`: ``_buffers`` or ``_parameters``."""
    return module._buffers if name in module._buffers else module._parameters


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether `module` has an attribute, without calling the author's ``__getattr__``."""
    return (
        name in vars(module)
        or name in module._parameters
        or name in module._buffers
        or name in module._modules
        or hasattr(type(module), name)
    )


def contiguous(value: Tensor) -> Tensor:
    """Return a new tensor of a delta in the layout in which files give it back.

    Products round by the layout of their factors.
    """
    if value.is_contiguous():
        return value
    made = value.detach().contiguous()
    if isinstance(value, nn.Buffer):
        return nn.Buffer(made, persistent=value.persistent)
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made


def add_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Add a tensor to `module`: an ``nn.Buffer`` as a buffer, all others as a parameter."""
    if isinstance(value, nn.Buffer):
        _add_buffer(module, name, value, value.persistent)
    else:
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        module._parameters[name] = parameter


def add_lazy_tensor(module: nn.Module, name: str, like: Tensor) -> None:
    """Add a tensor that has no shape yet; it becomes a buffer if `like` is one."""
    if isinstance(like, nn.Buffer):
        _add_buffer(module, name, UninitializedBuffer(), like.persistent)
    else:
        module._parameters[name] = UninitializedParameter()  # type: ignore[assignment]


# Not `register_buffer`: it asks ``hasattr(module, name)`` first, and a permissive ``__getattr__``
# of an author says yes to every name.
def _add_buffer(module: nn.Module, name: str, value: Tensor, persistent: bool) -> None:
    module._buffers[name] = value
    if not persistent:
        module._non_persistent_buffers_set.add(name)


def remove_tensor(module: nn.Module, name: str) -> None:
    """Undo `add_tensor`."""
    del held(module, name)[name]
    module._non_persistent_buffers_set.discard(name)


def put_values(module: nn.Module, values: Mapping[str, Tensor], only_lazy: bool = False) -> None:
    """Write values into tensors of `module`, and give them a shape or device where needed.

    Args:
        module: the module that holds the tensors.
        values: the new values, by the names on the module.
        only_lazy: skip the tensors that already have a shape.
    """
    with torch.no_grad():
        for name, value in values.items():
            holder = held(module, name)
            now: Any = holder[name]
            if is_lazy(now):
                now.materialize(value.shape, value.device, value.dtype)
            elif only_lazy:
                continue
            elif now.device != value.device:
                new = torch.empty_like(value)
                trained = isinstance(now, nn.Parameter)
                holder[name] = now = nn.Parameter(new, now.requires_grad) if trained else new
            now.copy_(value)


def settings_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """For each delta of `module`, its method and the settings that affect the result."""
    return {key: delta.settings for key, delta in present_deltas(module).items()}


def hidden_settings_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The settings that no shape shows, for each delta that `module` holds and that has any."""
    own = {key: delta for key, delta in present_deltas(module).items() if delta.owner is None}
    found = {key: delta.hidden_settings(module, key) for key, delta in own.items()}
    return {key: settings for key, settings in found.items() if settings}


def settings_incompatibilities(
    module: nn.Module, path: str, metadata: Mapping[str, Any], state: Mapping[str, Any]
) -> list[str]:
    """Compare the settings that a state was trained with to those of `module`, and list mismatches.

    Args:
        module: a module with deltas.
        path: its path, for messages.
        metadata: torch's metadata of the module, from ``state_dict()._metadata``.
        state: the state of the module, by its own names.
    """
    waiting = any(delta.waits for delta in present_deltas(module).values())
    if waiting and any(name in state for name in added_names(module)):
        return [
            f"{path or 'the network'} has no shape yet, and its delta depends on the shapes of all "
            "layers: run a batch through the network first"
        ]
    here, there = settings_of(module), metadata.get("gift")
    if not here or not all(here.values()):
        return []
    if there is None:  # a plain dictionary has lost the metadata
        if KEY not in state and not any(name in state for name in added_names(module)):
            return []
        here = hidden_settings_of(module)
        there = decoded(state[KEY]) if KEY in state else {}
    if here == there:
        return []
    where = path or "the network"
    if there is None:
        return [f"the settings of {where} in the state cannot be read: {KEY} is damaged"]
    if there:
        return [f"{where} was trained with {there}, here it has {here or 'the defaults'}"]
    return [
        f"{where} was trained with the defaults of its method, or the state was saved by a version "
        f"of gift that did not store settings; here it has {here} (if these are right, call "
        "net.load_state_dict(net.state_dict() | state))"
    ]


def named_deltas(network: nn.Module) -> Iterator[tuple[nn.Module, str, Delta]]:
    """All deltas in `network`: the module that uses it, the name of what it changes, the delta."""
    for module in network.modules():
        for key, delta in deltas_of(module).items():
            yield module, key, delta


class DeltaModule(Generated):
    """Mixin of every module that gained tensors."""

    def _gift_added(self) -> list[str]:
        return added_names(self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # `to_empty` moves a network off the meta device into uninitialized memory, so initialize
        # the deltas, for which no checkpoint of the base has values.
        own = deltas_of(self)
        waiting = [key for key, delta in own.items() if delta.is_on_meta(self)]
        result = super()._apply(*args, **kwargs)
        for key in waiting:
            own[key].reset(self, key)
        return result

    @property
    def gift_settings(self) -> Tensor:
        """The value of the entry `gift_settings` in the state.

        torch's distributed checkpoints look up each key of a state as an attribute of the module.
        """
        return encoded(hidden_settings_of(self))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hidden := hidden_settings_of(self):
            own = (held(self, name)[name] for name in added_names(self))
            destination[prefix + KEY] = encoded(hidden, next((t.device for t in own), None))

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any, *rest: Any
    ) -> None:
        *_, errors = rest
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        problems = settings_incompatibilities(self, prefix.rstrip("."), metadata, own)
        state_dict.pop(prefix + KEY, None)  # else torch would report it as unexpected
        errors += problems
        if not problems:
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


class OwnState(Generated):
    """Mixin for a module whose author overrides how its state is saved and loaded.

    The author's code sees the module as it was before adapting. It therefore writes the frozen
    tensors instead of the effective ones, and does not reject a delta as an unknown key. This mixin
    saves and loads the deltas.
    """

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        added = self._gift_added()
        _plain_twin(self, added)._save_to_state_dict(destination, prefix, keep_vars)
        for name in added:
            tensor = held(self, name).get(name)
            if tensor is not None and name not in self._non_persistent_buffers_set:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        module: Any = self
        added = [name for name in self._gift_added() if name in held(module, name)]
        coming = {key: state_dict.pop(key) for n in added if (key := prefix + n) in state_dict}
        own = nn.Module()
        for name in added:
            holder = own._buffers if name in module._buffers else own._parameters
            holder[name] = held(module, name)[name]
        own._non_persistent_buffers_set = module._non_persistent_buffers_set & {*added}
        with as_plain(module):
            module._load_from_state_dict(state_dict, prefix, *rest)
        own._load_from_state_dict(coming, prefix, *rest)
        for name in added:  # `assign=True` replaces the tensors
            held(module, name)[name] = held(own, name)[name]
        state_dict.update(coming)


def _plain_twin(module: nn.Module, added: list[str]) -> Any:
    """A read-only object of the plain class that has the same attributes, without the deltas."""
    state = vars(module)
    own = {**state, "_parameters": dict(state["_parameters"]), "_buffers": dict(state["_buffers"])}
    for name in added:
        own["_parameters"].pop(name, None)
        own["_buffers"].pop(name, None)
    own["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"].difference(added)
    return bare(plain_class(type(module)), own)


@contextmanager
def as_plain(module: nn.Module) -> Iterator[None]:
    """Context in which `module` is as before adapting: plain class, no deltas."""
    adapted = type(module)
    deltas = [(h, n, h[n]) for n in added_names(module) if n in (h := held(module, n))]
    orders = [(holder, list(holder)) for holder in (module._parameters, module._buffers)]
    try:
        for holder, name, _ in deltas:
            del holder[name]
        if "_gift_plain" in vars(adapted):
            set_class(module, plain_class(adapted))
        yield
    finally:
        set_class(module, adapted)
        for holder, name, tensor in deltas:
            holder[name] = tensor
        for holder, order in orders:
            put_order(holder, order)


def feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Let modules with state methods of an author save and load deltas too."""
    # Overrides in torch itself (those of lazy modules, for example) save every tensor of a module,
    # so only authors outside of torch count.
    own = any(not getattr(plain, name).__module__.startswith("torch.nn.") for name in _STATE)
    return ([OwnState] if own and (spec.tensors or spec.wrapped) else []), {}


_STATE = ("_save_to_state_dict", "_load_from_state_dict")
