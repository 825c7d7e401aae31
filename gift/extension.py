"""Extending the call of a module: parameters of its own, before or after what it computes.

As with adapted tensors, the module stays the object that it was, and the new parameters stand on it
under names of their own. Its class becomes a generated subclass whose ``forward`` calls the plain
one as the extension says.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.delta import Delta, DeltaModule, add_tensor, has_attribute, put_values
from gift.generated import Generated, Spec, change_class, contributes, plain_class
from gift.methods import AdaptationError
from gift.methods.settings import Configured, dtype_of
from gift.private.torch import is_compiled_by_old

Forward = Callable[..., Any]
CALLS: dict[str, type["CallMethod"]] = {}


@dataclass(frozen=True)
class CallMethod(Configured):
    """Base of what extends a call; a subclass is a frozen dataclass of its settings.

    Args:
        dtype: of the new parameters, or its name; None means that of the module, but at least
            float32.

    Raises:
        ValueError: for settings out of range; all of them are named.
    """

    name: ClassVar[str]
    """The name of the extension, and the beginning of its parameters' names."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = CALLS.setdefault(cls.__name__, cls)  # files name it so
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {cls.__name__!r} is taken by {known.__module__}")

    def fit(self, module: nn.Module) -> Self:
        """The method with what its call must know of the module.

        Raises:
            AdaptationError: if this module cannot be extended.
        """
        return self

    def init(self, module: nn.Module) -> dict[str, Tensor]:
        """New parameters for a module that is about to be extended.

        Raises:
            AdaptationError: if this module cannot be extended.
        """
        raise NotImplementedError

    def reset(self, module: nn.Module) -> dict[str, Tensor]:
        """New parameters for one that came from the meta device, whose own may have no values."""
        return self.init(module)

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the extended module gives; `forward` is what it would have called without it."""
        raise NotImplementedError

    def has_effect(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the extended module gives something else than the plain one."""
        return bool(parameters)

    def before_generate(self, module: nn.Module, named: Mapping[str, Any]) -> None:
        """Called before ``generate()`` of the extended module, or of one around it.

        Args:
            module: the extended module.
            named: the keywords of ``generate()``.

        Raises:
            AdaptationError: if the module could not be called as it will be.
        """

    def beside(self, weight: Tensor | None) -> dict[str, Any]:
        """Dtype and device of new parameters in a module that may have none, as keywords."""
        return {"dtype": dtype_of(self.dtype)} if weight is None else self.like(weight)


def call_method_of(name: str, settings: Mapping[str, Any]) -> CallMethod:
    """What extends a call, by the name of its class, with these settings.

    Raises:
        ValueError: for an unknown name or setting.
    """
    if name not in CALLS:
        raise ValueError(f"unknown extension of calls {name!r}; known: {sorted(CALLS)}")
    unknown = sorted(set(settings) - set(CALLS[name].__dataclass_fields__))
    if unknown:
        known = list(CALLS[name].__dataclass_fields__)
        raise ValueError(f"{name} has no setting {unknown}; it has {known}")
    return CALLS[name](**settings)


@dataclass
class Extension(Delta):
    """What a module knows of one extension of its call.

    Args:
        method: what extends it, fitted to the module.
        path: where the module stood in its network, for messages.
    """

    method: CallMethod = field(kw_only=True)
    path: str = field(default="", kw_only=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The method and its settings."""
        return {"method": self.method.name} | self.method.meaning

    def hidden_settings(self, module: nn.Module, key: str) -> dict[str, Any]:
        """What differs from the method with its defaults."""
        hidden = self.method.hidden_settings
        return hidden and {"method": self.method.name} | hidden

    def has_effect(self, module: nn.Module, key: str) -> bool:
        """Whether its parameters say so."""
        return not self.is_on_meta(module) and self.method.has_effect(self.tensors(module))

    def reset(self, module: Any, key: str) -> None:
        """Give the parameters their initial values."""
        made = self.method.reset(module)
        put_values(module, {self.names[name]: value for name, value in made.items()})


class ExtendedModule(DeltaModule):
    """What every module with an extended call gains."""

    _gift_extensions: dict[str, Extension]
    _gift_arguments: ClassVar[tuple[str, ...]]

    def _gift_call(self, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for extension in self._gift_extensions.values():
            call = functools.partial(_extended, self, extension, call)
        return call(*args, **kwargs)


class NestingEncoder(Generated):
    """An ``nn.TransformerEncoder`` packs padded batches as nested tensors where its first layer
    needs no gradient. Layers that are extended need one although that layer is frozen.
    """

    @property
    def use_nested_tensor(self) -> bool:
        """Whether it may, which is as before while no gradient is recorded."""
        if torch.is_grad_enabled() or is_compiled_by_old():  # which takes the flag for this again
            return False
        return self.__dict__.get("use_nested_tensor", False)

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def _extended(
    module: Any, extension: Extension, forward: Forward, *args: Any, **kwargs: Any
) -> Any:
    return extension.method.call(module, forward, extension.tensors(module), args, kwargs)


@contributes
def _extended_parts(plain: type, spec: Spec) -> tuple[list[type], dict[str, Any]]:
    if not spec.extended:
        return [], {}
    generated: Any = None  # the class that is being made: Python puts it into this variable's cell

    # The signature stays: trainers look into it to see which columns of a data set are used.
    @functools.wraps(plain.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_gift_extensions" not in self.__dict__:
            # Somebody kept this method, and the module is a plain one again.
            return type(self).forward(self, *args, **kwargs)
        return self._gift_call(super(generated, self).forward, args, kwargs)

    made: Any = forward
    cells = dict(zip(made.__code__.co_freevars, made.__closure__, strict=True))
    namespace = {
        "forward": forward,
        "_gift_arguments": argument_names(plain),
        "__classcell__": cells["generated"],
    }
    if _generates(plain):

        @functools.wraps(plain.generate)  # type: ignore[attr-defined]
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            if "_gift_extensions" not in self.__dict__:
                return type(self).generate(self, *args, **kwargs)
            for _, module, extension in named_extensions(self):
                extension.method.before_generate(module, kwargs)
            return super(generated, self).generate(*args, **kwargs)

        namespace["generate"] = generate
    nesting = [NestingEncoder] if issubclass(plain, nn.TransformerEncoder) else []
    return [ExtendedModule, *nesting], namespace


def _generates(plain: type) -> bool:
    """Whether it is a class that writes texts, as models of transformers do."""
    return callable(getattr(plain, "generate", None))


def argument_names(plain: Any) -> tuple[str, ...]:
    """What the arguments of a class's forward are called that can be given by position."""
    parameters = list(inspect.signature(plain.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def where(module: Any, name: str) -> str:
    """An extended module in words; `name` is that of the extension."""
    path = module._gift_extensions[name].path
    return f"{path or 'the network'} ({plain_class(type(module)).__name__})"


def extend_module(module: nn.Module, method: CallMethod, path: str = "") -> None:
    """Extend the call of `module`; its own parameters are left as they are.

    Args:
        module: any module that is called by itself.
        method: what extends it.
        path: where it stands in its network, for messages.

    Raises:
        AdaptationError: if it cannot be extended; nothing is changed then.
    """
    own: dict[str, Extension] = module.__dict__.get("_gift_extensions", {})
    _refuse(module)
    if method.name in own:
        raise AdaptationError(f"it is extended already, by {own[method.name].method}")
    method = method.fit(module)
    with torch.inference_mode(False), torch.no_grad():
        values = method.init(module)
    names = {key: f"{method.name}_{key}" for key in values}
    taken = [name for name in names.values() if has_attribute(module, name)]
    if taken:
        raise AdaptationError(f"it has attributes {taken} already, which this would hide")
    for key, value in values.items():
        add_tensor(module, names[key], value)
    extension = Extension(names, method=method, path=path)
    module.__dict__["_gift_extensions"] = own | {method.name: extension}
    # Fused kernels that compute a whole block without calling its parts look for hooks only. The
    # block's own kernel is what is called here, and may be used as before.
    if not isinstance(module, nn.TransformerEncoderLayer):
        module.register_forward_hook(_seen)
    change_class(module, extended=True)


def _refuse(module: nn.Module) -> None:
    if plain_class(type(module)).forward is nn.Module.forward:  # type: ignore[attr-defined]
        raise AdaptationError("it is never called, as it has no forward: extend what is inside it")
    if "forward" in module.__dict__:
        raise AdaptationError(
            "a forward was set on the object itself and would hide the extension: remove it first, "
            "or set it afterwards, around the present one"
        )
    lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise AdaptationError(f"{lazy} have no shape yet: run a batch through the network first")


def _seen(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing but be there."""


def named_extensions(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Module, Extension]]:
    """All extensions in `module`: path, the extended module, what extends it."""
    for path, part in module.named_modules(prefix=prefix):
        for extension in part.__dict__.get("_gift_extensions", {}).values():
            yield path, part, extension


def settle_modules_around(network: nn.Module) -> None:
    """Let modules around extended ones know: `NestingEncoder`, and those that generate."""
    for module in network.modules():
        concerned = isinstance(module, nn.TransformerEncoder) or _generates(type(module))
        if concerned and any(True for _ in named_extensions(module)):
            module.__dict__.setdefault("_gift_extensions", {})
            change_class(module, extended=True)


def release_extensions(module: nn.Module) -> None:
    """Undo `extend_module`, whose parameters are gone already; hooks go as all that is new goes."""
    if module.__dict__.pop("_gift_extensions", None) is not None:
        change_class(module, extended=False)
