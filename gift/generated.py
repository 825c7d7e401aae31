"""Generated classes: how a module changes its behaviour without ceasing to be what it was.

A generated class is a subclass of a module's own ("plain") class, with the same name and with
mixins in front. Its `Spec` says which, so that a copy or a pickle can generate it again. Each
feature contributes its mixins here and knows nothing of the others.
"""

import copy
from collections.abc import Callable
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
    """

    tensors: tuple[tuple[str, str], ...] = ()
    network: bool = False
    statistics: bool = False
    extended: bool = False


_PLAIN = Spec()

Contribution = Callable[[type, Spec], tuple[list[type], dict[str, Any]]]
_contributions: list[Contribution] = []
_classes: WeakValueDictionary[tuple[type, Spec], type] = WeakValueDictionary()


def contributes(contribution: Contribution) -> Contribution:
    """Decorator: from a plain class and a spec, the mixins and attributes of a feature."""
    _contributions.append(contribution)
    return contribution


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
        self.__class__ = plain_class(type(self))
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

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter itself: of an adapted weight, the frozen one."""
        path, _, name = target.rpartition(".")
        module: nn.Module = self.get_submodule(path)  # type: ignore[attr-defined]
        parameter = module._parameters.get(name)
        if parameter is None:
            return super().get_parameter(target)  # type: ignore[misc]
        return parameter


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Of classes with a way of their own to be copied: as a plain module, then as this one."""
    generated = type(self)
    self.__class__ = generated._gift_plain
    try:
        twin = copy.deepcopy(self, memo)
    finally:
        self.__class__ = generated
    for key, value in vars(self).items():
        if key.startswith("_gift_") and key not in vars(twin):
            vars(twin)[key] = copy.deepcopy(value, memo)
    twin.__class__ = generated_class(type(twin), self._gift_spec)
    return twin


def _recompile(self: Any) -> Any:
    """A graph module writes code into its class: into its own, not into the generated one."""
    generated = type(self)
    self.__class__ = generated._gift_plain
    try:
        return self.recompile()
    finally:
        self.__class__ = generated


def _rebuild(spec: Spec, rebuild: Any, args: tuple[Any, ...]) -> nn.Module:
    module = rebuild(*args)
    module.__class__ = generated_class(type(module), spec)
    return module


def generated_class(plain: type, spec: Spec) -> type:
    """The subclass of `plain` for that spec, the same one each time; `plain` itself for none."""
    if not any(spec):
        return plain
    key = (plain, spec)
    found = _classes.get(key)
    if found is None:
        found = _classes[key] = _generate(plain, spec)
    return found


def _generate(plain: type, spec: Spec) -> type:
    namespace: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_gift_plain": plain,
        "_gift_spec": spec,
    }
    if hasattr(plain, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    if hasattr(plain, "recompile"):
        namespace["recompile"] = _recompile
    mixins: list[type] = []
    for contribution in _contributions:
        more_mixins, attributes = contribution(plain, spec)
        mixins += more_mixins
        namespace |= attributes
    return type(plain)(plain.__name__, (*mixins, plain), namespace)


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
    # Past the module's own `__setattr__`, which looks for parameters in whatever is set.
    object.__setattr__(module, "__class__", generated_class(plain_class(type(module)), spec))
