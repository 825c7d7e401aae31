"""Wrapped forward passes: parameters that act before or after what a module computes.

As with adapted tensors, the module stays the same object, and the new parameters are stored on it
under their own names. Its class becomes a generated subclass whose ``forward`` lets the wrapper
call the plain one.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import Delta, DeltaModule, add_tensor, has_attribute, put_values
from gift.core.dynamic_class import Generated, Spec, change_class, plain_class
from gift.errors import AdaptationError
from gift.layers.blocks import fuses_layers, nests_batches
from gift.methods.settings import Configured, dtype_of
from gift.private.torch.tracing import is_compiled_by_old
from gift.support.sharding import is_sharded

Forward = Callable[..., Any]
FORWARD_METHODS: dict[str, type["ForwardMethod"]] = {}


@dataclass(frozen=True)
class ForwardMethod(Configured):
    """Base class of methods that wrap a forward pass; a subclass is a frozen dataclass of settings.

    Args:
        dtype: of the new parameters, or its name. None means the dtype of the module, but at least
            float32.

    Raises:
        ValueError: for settings out of range; all of them are named.
    """

    name: ClassVar[str]
    """The name of the wrapper, and the prefix of its parameters' names."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = FORWARD_METHODS.setdefault(cls.__name__, cls)  # the name that files use
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {cls.__name__!r} is taken by {known.__module__}")

    def fit(self, module: nn.Module) -> Self:
        """Return the method with what its call must know about `module`.

        Raises:
            AdaptationError: if the forward pass of this module cannot be wrapped.
        """
        return self

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """New parameters for a module whose forward pass is about to be wrapped.

        Raises:
            AdaptationError: if the forward pass of this module cannot be wrapped.
        """
        raise NotImplementedError

    def reset(self, module: nn.Module) -> dict[str, Tensor]:
        """New parameters for a module from the meta device, whose own may still have no values."""
        return self.init_parameters(module)

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the output of the wrapped module; `forward` is the forward pass inside."""
        raise NotImplementedError

    def has_effect(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the wrapped module computes something else than the plain one."""
        return bool(parameters)

    def generating(
        self, module: nn.Module, named: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Context of ``generate()`` of the wrapped module, or of a module around it.

        Args:
            module: the wrapped module.
            named: the keyword arguments of ``generate()``; an argument by position is ``inputs``.

        Raises:
            AdaptationError: if generation would call the module in a way that the wrapper cannot
                handle.
        """
        return nullcontext()

    def beside(self, weight: Tensor | None) -> dict[str, Any]:
        """Keyword arguments (dtype, device) for new parameters; `weight` may be None."""
        return {"dtype": dtype_of(self.dtype)} if weight is None else self.factory_kwargs(weight)


def forward_method_of(name: str, settings: Mapping[str, Any]) -> ForwardMethod:
    """Create a forward method from the name of its class and its settings.

    Raises:
        ValueError: for an unknown name or setting.
    """
    if name not in FORWARD_METHODS:
        raise ValueError(f"unknown wrapper {name!r}; known: {sorted(FORWARD_METHODS)}")
    unknown = sorted(set(settings) - set(FORWARD_METHODS[name].__dataclass_fields__))
    if unknown:
        known = list(FORWARD_METHODS[name].__dataclass_fields__)
        raise ValueError(f"{name} has no setting {unknown}; it has {known}")
    return FORWARD_METHODS[name](**settings)


@dataclass
class ForwardDelta(Delta):
    """Record of one wrapper around a module's forward pass.

    Args:
        method: the wrapper, fitted to the module.
        path: where the module stood in its network, for messages.
    """

    method: ForwardMethod = field(kw_only=True)
    path: str = field(default="", kw_only=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The method and its settings."""
        return {"method": self.method.name} | self.method.compat_settings

    def hidden_settings(self, module: nn.Module, key: str) -> dict[str, Any]:
        """The settings that differ from the method's defaults."""
        hidden = self.method.hidden_settings
        return hidden and {"method": self.method.name} | hidden

    def has_effect(self, module: nn.Module, key: str) -> bool:
        """Whether the values of its parameters change what the module computes."""
        return not self.is_on_meta(module) and self.method.has_effect(self.tensors(module))

    def reset(self, module: nn.Module, key: str) -> None:
        """Give the parameters their initial values."""
        made = self.method.reset(module)
        put_values(module, {self.names[name]: value for name, value in made.items()})


class WrappedModule(DeltaModule):
    """Mixin of every module with a wrapped forward pass."""

    _gift_forwards: dict[str, ForwardDelta]
    _gift_arguments: ClassVar[tuple[str, ...]]

    def _gift_call(self, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for wrapper in self._gift_forwards.values():
            call = functools.partial(_call_wrapped, self, wrapper, call)
        return call(*args, **kwargs)


class NestingEncoder(Generated):
    """Mixin of an ``nn.TransformerEncoder`` around wrapped layers: no nested tensors in training.

    The encoder packs padded batches as nested tensors if its first layer needs no gradient. Wrapped
    layers need gradients although that first layer is frozen.
    """

    @property
    def use_nested_tensor(self) -> bool:
        """The flag of the encoder while no gradient is recorded, else False."""
        if torch.is_grad_enabled() or is_compiled_by_old():  # its `__dict__` gives this property
            return False
        own: bool = self.__dict__["use_nested_tensor"]
        return own

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def _call_wrapped(
    module: nn.Module, wrapper: ForwardDelta, forward: Forward, *args: Any, **kwargs: Any
) -> Any:
    return wrapper.method.call(module, forward, wrapper.tensors(module), args, kwargs)


def feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Wrap the forward pass, and adapt what depends on it: ``generate``, nested tensors."""
    if not spec.wrapped:
        return [], {}
    generated: Any = None  # ``__classcell__`` below: Python stores the new class in this cell

    # Keep the signature: trainers inspect it to see which columns of a data set are used.
    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
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
            named = {"inputs": args[0], **kwargs} if args else kwargs
            with ExitStack() as stack:
                for _, module, wrapper in named_forward_deltas(self):
                    stack.enter_context(wrapper.method.generating(module, named))
                return super(generated, self).generate(*args, **kwargs)

        namespace["generate"] = generate
    nesting = [NestingEncoder] if nests_batches(plain) else []
    return [WrappedModule, *nesting], namespace


def _generates(plain: type[nn.Module]) -> bool:
    """Whether a class generates text, as models of transformers do."""
    return callable(getattr(plain, "generate", None))


def argument_names(plain: Any) -> tuple[str, ...]:
    """Names of the arguments of a class's forward that can be passed by position."""
    parameters = list(inspect.signature(plain.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def where(module: Any, name: str) -> str:
    """Describe a wrapped module for messages; `name` is the name of the wrapper."""
    path = module._gift_forwards[name].path
    return f"{path or 'the network'} ({plain_class(type(module)).__name__})"


def forward_deltas(module: nn.Module) -> Mapping[str, ForwardDelta]:
    """Return the records of a module's wrappers, by their names; empty for most modules."""
    own: dict[str, ForwardDelta] = module.__dict__.get("_gift_forwards", {})
    return own


def wrap_forward(module: nn.Module, method: ForwardMethod, path: str = "") -> None:
    """Wrap the forward pass of `module`; its own parameters stay as they are.

    Args:
        module: any module that is called itself.
        method: the wrapper.
        path: where the module stands in its network, for messages.

    Raises:
        AdaptationError: if the forward pass cannot be wrapped; nothing is changed then.
    """
    own = dict(forward_deltas(module))
    _refuse(module)
    if method.name in own:
        raise AdaptationError(f"it is already wrapped by {own[method.name].method}")
    method = method.fit(module)
    with torch.inference_mode(False), torch.no_grad():
        values = method.init_parameters(module)
    names = {key: f"{method.name}_{key}" for key in values}
    present = [name for name in names.values() if has_attribute(module, name)]
    if present:
        raise AdaptationError(f"it already has attributes {present}, which this would hide")
    for key, value in values.items():
        add_tensor(module, names[key], value)
    wrapper = ForwardDelta(names, method=method, path=path)
    module.__dict__["_gift_forwards"] = own | {method.name: wrapper}
    # Fused kernels compute a whole block without calling its submodules, unless these have hooks.
    # An encoder layer gets no hook: the wrapper calls the layer itself, which may use its own
    # kernel.
    if not fuses_layers(module):
        module.register_forward_hook(_seen)
    change_class(module, wrapped=True)


def _refuse(module: nn.Module) -> None:
    if plain_class(type(module)).forward is nn.Module.forward:
        raise AdaptationError("it is never called, as it has no forward: wrap what is inside it")
    if "forward" in module.__dict__:
        raise AdaptationError(
            "a forward was set on the object itself and would hide the wrapper: remove it first, "
            "or set it afterwards, around the present one"
        )
    if spread := [n for n, p in module._parameters.items() if p is not None and is_sharded(p)]:
        raise AdaptationError(
            f"tensor parallelism spreads its {spread}, and its outputs with them: wrap the block "
            "around it"
        )
    lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise AdaptationError(f"{lazy} have no shape yet: run a batch through the network first")


def _seen(module: nn.Module, args: Any, output: object) -> None:
    """A forward hook that does nothing; its presence disables fused kernels."""


def named_forward_deltas(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Module, ForwardDelta]]:
    """All wrappers in `module`: path, wrapped module, record of the wrapper."""
    for path, part in module.named_modules(prefix=prefix):
        for wrapper in forward_deltas(part).values():
            yield path, part, wrapper


def settle_modules_around(network: nn.Module) -> None:
    """Generate classes for modules around wrapped ones: encoders (`NestingEncoder`), generators."""
    for module in network.modules():
        concerned = nests_batches(type(module)) or _generates(type(module))
        if concerned and any(True for _ in named_forward_deltas(module)):
            module.__dict__.setdefault("_gift_forwards", {})
            change_class(module, wrapped=True)


def unwrap_forwards(module: nn.Module) -> None:
    """Undo `wrap_forward`, after its parameters and hooks were removed with all other additions."""
    if module.__dict__.pop("_gift_forwards", None) is not None:
        change_class(module, wrapped=False)
