"""Generated classes: change the behaviour of a module without changing what it is.

A generated class is a subclass of the module's own ("plain") class. It has the same name, and
mixins in front. Its `Spec` says which mixins, so a copy or a pickle can generate the class again.
The features that contribute the mixins are listed in `gift.core.features` and are independent of
each other.

Python lets an object change its class only to one of the same memory layout, and takes the layout
of a class from its first base. The plain class is therefore the first base of a generated class,
whatever bases it has itself (``ABC``, ``Generic``, classes with ``__slots__``). A metaclass then
moves the mixins in front of it in the method resolution order.
"""

import copy
import functools
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex
from weakref import WeakValueDictionary

from torch import nn


class Spec(NamedTuple):
    """The difference between a generated class and the plain one.

    Args:
        tensors: the adapted tensors, each with the name of its method.
        network: whether the module is the network that was passed to `enable_fine_tuning`.
        statistics: whether the running statistics of a norm layer are frozen.
        wrapped: whether the module's forward pass is wrapped.
        part: whether the module is inside such a network and has a method to save itself as a
            model.
    """

    tensors: tuple[tuple[str, str], ...] = ()
    network: bool = False
    statistics: bool = False
    wrapped: bool = False
    part: bool = False


_PLAIN = Spec()

_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs_ex__")

Feature = Callable[[type, Spec], tuple[list[type], dict[str, Any]]]
"""Maps a plain class and a spec to the mixins and class attributes of one feature."""

_classes: WeakValueDictionary[tuple[type, Spec], type] = WeakValueDictionary()
_metaclasses: WeakValueDictionary[type, type] = WeakValueDictionary()


if TYPE_CHECKING:

    class _Module(nn.Module):
        """What all mixins are mixed into, with types for methods that have none in torch."""

        def _apply(self, *args: Any, **kwargs: Any) -> Any: ...
        def __setstate__(self, state: Any) -> None: ...
        def register_load_state_dict_post_hook(self, hook: Any) -> Any: ...

else:
    _Module = object


def _let_outlive(cls: Any) -> None:
    """Let the methods of a class be called by those who kept them until a module had another class.

    The module does then what it is: it may be plain again, or adapted by another method.
    """
    for name, value in list(vars(cls).items()):
        if isinstance(value, FunctionType) and not name.startswith(("_gift", "__")):
            type.__setattr__(cls, name, _outliving(cls, name, value))


def _outliving(cls: type, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, cls):
            return method(self, *args, **kwargs)
        return getattr(type(self), name)(self, *args, **kwargs)

    return run


class Generated(_Module):
    """Base class of all mixins."""

    _gift_plain: type[nn.Module]
    _gift_spec: Spec

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Stop here: ``__init_subclass__`` of the plain class must not see a subclass that no author
        # wrote.
        if "_gift_spec" in vars(cls) or cls.__module__.startswith("gift."):  # no class of a user
            _let_outlive(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Some code calls the class of a module to make another one: slicing an `nn.Sequential`
        # does. The new module is plain.
        set_class(self, plain_class(type(self)))
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # Pickle finds a class by its name, and a generated class has the name of the plain one. So
        # pickle the plain class, and generate the class again when loading.
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
        """Hook that runs on a copy that the author's code made, after gift has completed it."""


def _get_parameter(self: Any, target: str) -> nn.Parameter:
    """``get_parameter`` that returns the frozen parameter of an adapted weight."""
    path, _, name = target.rpartition(".")
    module: nn.Module = self.get_submodule(path)
    parameter = module._parameters.get(name)
    if parameter is None:
        own: nn.Parameter = super(self._gift_plain, self).get_parameter(target)
        return own
    return parameter


class _Gained(NamedTuple):
    """What gift added to one module, to restore it on a copy that the author's code made."""

    spec: Spec
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    not_saved: list[str]

    def put(self, module: Any) -> None:
        """Add it to a copy."""
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
    """State of a module whose author customized copying, with what gift adds to it.

    Args:
        theirs: what the author's method returned, if there is one.
        parts: the module and all of its submodules, by path.
        gained: what gift added to each of them, by path.
        flags: ``requires_grad`` of the parameters, by name.
    """

    theirs: tuple[Any, ...]
    parts: dict[str, nn.Module]
    gained: dict[str, _Gained]
    flags: dict[str, bool]

    def complete(self, twin: nn.Module, memo: dict[int, Any]) -> None:
        """Add to a copy what its original had, for every path that the copy has too.

        If the author's code made new submodules, what gift recorded about the original ones is
        copied and refers to the new ones.
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
    """Context in which the author's code can copy `module`: plain classes, original tensors only.

    The module itself is only read: copies of its dictionaries, without deltas, replace them
    meanwhile.
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
    """``__deepcopy__`` for classes that customize copying: copy the plain module, complete it."""
    with _as_plain(self):
        twin = copy.deepcopy(self, memo)
    _state_of(self).complete(twin, memo)
    return twin


def _reduce(self: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` for classes that customize pickling: pickle as a plain module."""
    with _as_plain(self):
        reduced = self.__reduce_ex__(protocol)
    rebuild, args, theirs, *rest = (*reduced, None) if len(reduced) == 2 else reduced
    state = _state_of(self, (theirs,) if theirs is not None else ())
    return (_rebuild, (self._gift_spec, rebuild, args), state, *rest)


def _set_state(self: Any, state: Any) -> None:
    """``__setstate__`` that restores what `_reduce` gave."""
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
    """``recompile`` of a `GraphModule`: write the code into the plain class, not this one."""
    generated = type(self)
    set_class(self, generated._gift_plain)
    try:
        return self.recompile()
    finally:
        set_class(self, generated)


def _rebuild(spec: Spec, rebuild: Any, args: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = rebuild(*args)
    set_class(module, generated_class(type(module), spec))
    return module


def generated_class(plain: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """The subclass of `plain` for `spec`, cached; `plain` itself for an empty spec."""
    if not any(spec):
        return plain
    key = (plain, spec)
    found = _classes.get(key)
    if found is None:
        found = _classes.setdefault(key, _generate(plain, spec))
    return found


def _generate(plain: type[nn.Module], spec: Spec) -> type[nn.Module]:
    namespace: dict[str, Any] = {"_gift_plain": plain, "_gift_spec": spec}
    # nn.Module.get_parameter uses getattr, and refuses the effective weight: it is not a parameter.
    if plain.get_parameter is nn.Module.get_parameter:
        namespace["get_parameter"] = _get_parameter
    if hasattr(plain, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    # Compare with the current methods: torch.compile replaces `nn.Module.__setstate__`.
    if any(getattr(plain, n, None) is not getattr(nn.Module, n, None) for n in _PICKLING):
        namespace |= {"__reduce_ex__": _reduce, "__setstate__": _set_state}
    if hasattr(plain, "recompile"):
        namespace["recompile"] = _recompile
    mixins: list[type] = []
    from gift.core.features import FEATURES  # circular: features import this file

    for feature in FEATURES:
        more_mixins, attributes = feature(plain, spec)
        mixins += more_mixins
        namespace |= attributes
    return subclass_with(mixins, plain, namespace)


def subclass_with(
    mixins: Iterable[type], plain: type[nn.Module], namespace: dict[str, Any]
) -> type[nn.Module]:
    """Create a subclass of `plain` with its name and layout, and with the mixins first in the MRO.

    Neither ``__init_subclass__`` of the author (if a mixin defines its own) nor the author's
    metaclass sees the class, as no author wrote it.

    Args:
        mixins: the classes in front.
        plain: any class.
        namespace: further class attributes.
    """
    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_gift_mixins": tuple(mixins),
    } | namespace
    metaclass = _mixing(type(plain))
    # Call ``__new__`` of Python directly: an author's metaclass may register its classes.
    maker: Any = ABCMeta if issubclass(metaclass, ABCMeta) else type
    bases = (plain, *namespace["_gift_mixins"])
    made: type[nn.Module] = maker.__new__(metaclass, plain.__name__, bases, namespace)
    return made


def _mixing(metaclass: type) -> type:
    """A subclass of `metaclass` that puts mixins before the first base in the MRO."""
    found = _metaclasses.get(metaclass)
    if found is None:

        def mro(cls: Any) -> list[type]:
            order: list[type] = super(made, cls).mro()  # type: ignore[arg-type]
            if "_gift_mixins" not in vars(cls):
                return order  # a user's subclass of a generated class
            plain = cls.__bases__[0].__mro__
            return [cls, *(base for base in order[1:] if base not in plain), *plain]

        def delete(cls: Any, name: str) -> None:
            # torch deletes attributes of classes that it believes to have made
            # (`nn.utils.parametrize`), so a feature can handle the deletion itself.
            instead = vars(cls).get("_gift_delete")
            super(made, cls).__delattr__(name) if instead is None else instead(cls, name)  # type: ignore[arg-type]

        made = type(metaclass.__name__, (metaclass,), {"mro": mro, "__delattr__": delete})
        found = _metaclasses.setdefault(metaclass, made)
    return found


def joined(path: str, name: str) -> str:
    """Join a path and a name to a dotted path; the root network's own path is empty."""
    return f"{path}.{name}" if path and name else path or name


def plain_class(cls: type) -> type[nn.Module]:
    """The class as it was before fine-tuning."""
    plain: type[nn.Module] = getattr(cls, "_gift_plain", cls)
    return plain


def spec_of(module: nn.Module) -> Spec:
    """The spec of the module's class; an empty spec for a plain class."""
    return getattr(type(module), "_gift_spec", _PLAIN)


def change_class(module: nn.Module, **changes: Any) -> None:
    """Update the spec of `module` with `changes` and set the matching class."""
    spec = spec_of(module)._replace(**changes)
    set_class(module, generated_class(plain_class(type(module)), spec))


def set_class(module: nn.Module, cls: type) -> None:
    """Set the class of `module` without its own ``__setattr__``, which may refuse."""
    object.__setattr__(module, "__class__", cls)


def bare(cls: type, state: dict[str, Any]) -> Any:
    """Create an object of `cls` with these attributes, without running code of its author."""
    heap = 1 << 9  # Py_TPFLAGS_HEAPTYPE: only built-ins (`object`, `dict`) lack it
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & heap)
    made = base.__new__(cls)
    object.__setattr__(made, "__dict__", state)
    return made
