"""Generated classes: how a module changes its behaviour without ceasing to be what it was.

A generated class is a subclass of a module's own ("plain") class, with the same name and with
mixins in front. Its `Spec` says which, so that a copy or a pickle can generate it again. The
features, each of which knows nothing of the others, stand in `gift.core.features`.

An object may change its class only to one of the same memory layout, and Python takes the layout of
a class from its first base. So the plain class is the first base of a generated one, whatever bases
it has itself (``ABC``, ``Generic``, others with ``__slots__``); a metaclass then puts the mixins in
front of it in the method resolution order.
"""

import copy
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import nn


class Spec(NamedTuple):
    """What distinguishes a generated class from the plain one.

    Args:
        tensors: the adapted tensors, each with the name of its method.
        network: whether the module is a whole network that is being fine-tuned.
        statistics: whether the running statistics of a norm layer are frozen.
        extended: whether the module's call is extended.
        part: whether it is a part of such a network, and has a method to save itself as a model.
    """

    tensors: tuple[tuple[str, str], ...] = ()
    network: bool = False
    statistics: bool = False
    extended: bool = False
    part: bool = False


_PLAIN = Spec()

_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs_ex__")

Feature = Callable[[type, Spec], tuple[list[type], dict[str, Any]]]
"""From a plain class and a spec, the mixins and attributes that a feature gives the class."""

_classes: WeakValueDictionary[tuple[type, Spec], type] = WeakValueDictionary()
_metaclasses: WeakValueDictionary[type, type] = WeakValueDictionary()


class Generated:
    """Base of all mixins."""

    _gift_plain: type[nn.Module]
    _gift_spec: Spec

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Ends here: a hook of the plain class would see a subclass that nobody wrote.
        pass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Somebody calls the class of a module to make another one, as a slice of `nn.Sequential`
        # does: that is a plain one.
        set_class(self, plain_class(type(self)))
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds a class by its name, and the generated one has the plain one's name: pickle
        # the plain class, and generate the other again.
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, args, *rest = reduced
        plain = plain_class(type(self))
        args = tuple(plain if arg is type(self) else arg for arg in args)
        rebuild = plain if rebuild is type(self) else rebuild
        return (_rebuild, (self._gift_spec, rebuild, args), *rest)

    def _gift_added(self) -> list[str]:
        """Names of the parameters and buffers that the module itself gained."""
        return []

    def _gift_copied(self) -> None:
        """Called on a copy that the author's own code made and gift completed."""


def _get_parameter(self: Any, target: str) -> nn.Parameter:
    """The parameter itself: of an adapted weight, the frozen one."""
    path, _, name = target.rpartition(".")
    module: nn.Module = self.get_submodule(path)
    parameter = module._parameters.get(name)
    if parameter is None:
        return super(self._gift_plain, self).get_parameter(target)
    return parameter


class _Gained(NamedTuple):
    """What gift put on one module, for copies that the author's own code makes without it."""

    spec: Spec
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    not_saved: list[str]

    def put(self, module: Any) -> None:
        """Complete a copy."""
        state = vars(module)
        state.update(self.attributes)
        state["_parameters"].update(self.parameters)
        state["_buffers"].update(self.buffers)
        state["_non_persistent_buffers_set"].update(self.not_saved)
        set_class(module, generated_class(plain_class(type(module)), self.spec))
        module._gift_copied()


def _gained(module: Any) -> _Gained:
    state, added = vars(module), module._gift_added()
    return _Gained(
        module._gift_spec,
        {key: value for key, value in state.items() if key.startswith("_gift_")},
        {key: state["_parameters"][key] for key in added if key in state["_parameters"]},
        {key: state["_buffers"][key] for key in added if key in state["_buffers"]},
        [key for key in added if key in state["_non_persistent_buffers_set"]],
    )


class _State(NamedTuple):
    """The state of a module whose author says how it is copied, and what gift adds to it.

    Args:
        theirs: the author's, if there is one.
        parts: the module and all in it, by path.
        gained: what gift put on them.
        flags: ``requires_grad`` of the parameters.
    """

    theirs: tuple[Any, ...]
    parts: dict[str, nn.Module]
    gained: dict[str, _Gained]
    flags: dict[str, bool]

    def complete(self, twin: nn.Module, memo: dict[int, Any]) -> None:
        """Put on a copy what its original had, wherever it has such a part.

        Its author may have made the parts anew. What gift knows of the original ones is then to be
        known of these.
        """
        now = dict(twin.named_modules())
        for path, part in self.parts.items():
            if path in now:
                memo[id(part)] = now[path]
                for one, other in ((part._parameters, now[path]._parameters),
                                   (part._buffers, now[path]._buffers)):  # fmt: skip
                    memo |= {id(t): other[name] for name, t in one.items() if name in other}
        same = all(now.get(path) is part for path, part in self.parts.items())
        for path, gained in self.gained.items():
            if path in now:
                (gained if same else copy.deepcopy(gained, memo)).put(now[path])
        for name, parameter in nn.Module.named_parameters(twin, remove_duplicate=False):
            parameter.requires_grad = self.flags.get(name, parameter.requires_grad)


def _state_of(module: nn.Module, theirs: tuple[Any, ...] = ()) -> _State:
    named = nn.Module.named_parameters(module, remove_duplicate=False)
    return _State(
        theirs,
        dict(module.named_modules()),
        {path: _gained(part) for path, part in module.named_modules() if any(spec_of(part))},
        {name: parameter.requires_grad for name, parameter in named},
    )


@contextmanager
def _as_plain(module: nn.Module) -> Iterator[None]:
    """Within it, `module` is to be copied as its author knows it: plain, with its own tensors.

    It is looked at only, so other dictionaries take the place of those with deltas meanwhile.
    """
    modules: list[Any] = [part for part in module.modules() if any(spec_of(part))]
    keys = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    kept = [(m, type(m), {key: vars(m)[key] for key in keys}) for m in modules]
    try:
        for part, generated, holders in kept:
            if added := part._gift_added():
                for key in keys[:2]:
                    own = {name: t for name, t in holders[key].items() if name not in added}
                    vars(part)[key] = own
                vars(part)[keys[2]] = holders[keys[2]].difference(added)
            set_class(part, plain_class(generated))
        yield
    finally:
        for part, generated, holders in kept:
            set_class(part, generated)
            vars(part).update(holders)


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Of classes with a way of their own to be copied: as a plain module, then as this one."""
    with _as_plain(self):
        twin = copy.deepcopy(self, memo)
    _state_of(self).complete(twin, memo)
    return twin


def _reduce(self: Any, protocol: Any) -> Any:
    """Of classes with a way of their own to be pickled: the same."""
    with _as_plain(self):
        reduced = self.__reduce_ex__(protocol)
    rebuild, args, theirs, *rest = (*reduced, None) if len(reduced) == 2 else reduced
    state = _state_of(self, (theirs,) if theirs is not None else ())
    return (_rebuild, (self._gift_spec, rebuild, args), state, *rest)


def _set_state(self: Any, state: Any) -> None:
    """Undo `_reduce`."""
    generated = type(self)
    set_class(self, plain_class(generated))
    if not isinstance(state, _State):
        self.__setstate__(state)
        set_class(self, generated)
        return
    for theirs in state.theirs:
        self.__setstate__(theirs)
    state.complete(self, {})


def _recompile(self: Any) -> Any:
    """A graph module writes code into its class: into its own, not into the generated one."""
    generated = type(self)
    set_class(self, generated._gift_plain)
    try:
        return self.recompile()
    finally:
        set_class(self, generated)


def _rebuild(spec: Spec, rebuild: Any, args: tuple[Any, ...]) -> nn.Module:
    module = rebuild(*args)
    set_class(module, generated_class(type(module), spec))
    return module


def generated_class(plain: type, spec: Spec) -> type:
    """The subclass of `plain` for that spec, the same one each time; `plain` itself for none."""
    if not any(spec):
        return plain
    key = (plain, spec)
    found = _classes.get(key)
    if found is None:
        found = _classes.setdefault(key, _generate(plain, spec))
    return found


def _generate(plain: type, spec: Spec) -> type:
    namespace: dict[str, Any] = {"_gift_plain": plain, "_gift_spec": spec}
    if plain.get_parameter is nn.Module.get_parameter:  # type: ignore[attr-defined]
        namespace["get_parameter"] = _get_parameter
    if hasattr(plain, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    # Compared with what is there now: torch.compile replaces `nn.Module.__setstate__`.
    if any(getattr(plain, n, None) is not getattr(nn.Module, n, None) for n in _PICKLING):
        namespace |= {"__reduce_ex__": _reduce, "__setstate__": _set_state}
    if hasattr(plain, "recompile"):
        namespace["recompile"] = _recompile
    mixins: list[type] = []
    from gift.core.features import FEATURES  # which need this file themselves

    for feature in FEATURES:
        more_mixins, attributes = feature(plain, spec)
        mixins += more_mixins
        namespace |= attributes
    return subclass_with(mixins, plain, namespace)


def subclass_with(mixins: Iterable[type], plain: type, namespace: dict[str, Any]) -> type:
    """A subclass of `plain` with its name and its layout, in which the mixins come first.

    Hooks of the author do not see it, as nobody wrote it: neither ``__init_subclass__``, if a mixin
    has one of its own, nor what a metaclass does with new classes.

    Args:
        mixins: the classes in front.
        plain: any class.
        namespace: further attributes.
    """
    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_gift_mixins": tuple(mixins),
    } | namespace
    metaclass = _mixing(type(plain))
    maker: Any = ABCMeta if issubclass(metaclass, ABCMeta) else type
    return maker.__new__(metaclass, plain.__name__, (plain, *namespace["_gift_mixins"]), namespace)


def _mixing(metaclass: type) -> type:
    """The metaclass under which mixins come before the first base."""
    found = _metaclasses.get(metaclass)
    if found is None:

        def mro(cls: Any) -> list[type]:
            order = super(made, cls).mro()  # type: ignore[arg-type]
            if "_gift_mixins" not in vars(cls):
                return order  # somebody's subclass of a generated class
            plain = cls.__bases__[0].__mro__
            return [cls, *(base for base in order[1:] if base not in plain), *plain]

        def delete(cls: Any, name: str) -> None:
            # A feature may stand in for a class of which torch expects to have made it.
            instead = vars(cls).get("_gift_delete")
            super(made, cls).__delattr__(name) if instead is None else instead(cls, name)  # type: ignore[arg-type]

        made = type(metaclass.__name__, (metaclass,), {"mro": mro, "__delattr__": delete})
        found = _metaclasses.setdefault(metaclass, made)
    return found


def joined(*names: str) -> str:
    """Names joined to a dotted path; the network's own name is empty."""
    return ".".join(filter(None, names))


def plain_class(cls: type) -> type:
    """The class before any fine-tuning."""
    return getattr(cls, "_gift_plain", cls)


def spec_of(module: nn.Module) -> Spec:
    """What fine-tuning made of the module's class; an empty spec for a plain one."""
    return getattr(type(module), "_gift_spec", _PLAIN)


def change_class(module: nn.Module, **changes: Any) -> None:
    """Give `module` the generated class in which its spec has these values."""
    spec = spec_of(module)._replace(**changes)
    set_class(module, generated_class(plain_class(type(module)), spec))


def set_class(module: Any, cls: type) -> None:
    """Give `module` a class, past its own ``__setattr__``, whose author may refuse."""
    object.__setattr__(module, "__class__", cls)


def bare(cls: type, state: dict[str, Any]) -> Any:
    """An object of that class with these attributes, which no code of its author made."""
    heap = 1 << 9  # Py_TPFLAGS_HEAPTYPE: what is left are `object` and the like of `dict`
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & heap)
    made = base.__new__(cls)
    object.__setattr__(made, "__dict__", state)
    return made
