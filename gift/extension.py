"""Extending the call of a module: parameters of its own, before or after what it computes.

As with adapted tensors, the module stays the object that it was, and the new parameters stand on it
under names of their own. Its class becomes a generated subclass whose ``forward`` calls the plain
one as the extension says.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from gift.delta import Delta, DeltaModule, add_tensor, put_values
from gift.generated import Spec, change_class, contributes, spec_of
from gift.methods import AdaptationError

Forward = Callable[..., Any]


class CallMethod:
    """Base of what extends a call; a subclass is a frozen dataclass of its settings."""

    name: ClassVar[str]
    """The name of the extension, and the beginning of its parameters' names."""

    def init(self, module: nn.Module) -> dict[str, Tensor]:
        """New parameters for a module that is about to be extended.

        Raises:
            AdaptationError: if this module cannot be extended.
        """
        raise NotImplementedError

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

    @property
    def meaning(self) -> dict[str, Any]:
        """What a saved delta and a network must agree on."""
        raise NotImplementedError


@dataclass
class Extension(Delta):
    """What a module knows of one extension of its call."""

    method: CallMethod = field(kw_only=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The method and its settings."""
        return {"method": self.method.name} | self.method.meaning

    def reset(self, module: Any, key: str) -> None:
        """Give the parameters their initial values."""
        made = self.method.init(module)
        put_values(module, {self.names[name]: value for name, value in made.items()})


class ExtendedModule(DeltaModule):
    """What every module with an extended call gains."""

    _gift_extensions: dict[str, Extension]

    def _gift_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Forward = super().forward  # type: ignore[misc]
        for extension in self._gift_extensions.values():
            call = functools.partial(_extended, self, extension, call)
        return call(*args, **kwargs)


def _extended(
    module: Any, extension: Extension, forward: Forward, *args: Any, **kwargs: Any
) -> Any:
    return extension.method.call(module, forward, extension.tensors(module), args, kwargs)


@contributes
def _extended_parts(plain: type, spec: Spec) -> tuple[list[type], dict[str, Any]]:
    if not spec.extended:
        return [], {}

    # The signature stays: trainers look into it to see which columns of a data set are used.
    @functools.wraps(plain.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._gift_call(args, kwargs)

    return [ExtendedModule], {"forward": forward}


def extend_module(module: nn.Module, method: CallMethod) -> None:
    """Extend the call of `module`; its own parameters are left as they are.

    Raises:
        AdaptationError: if it cannot be extended; nothing is changed then.
    """
    own: dict[str, Extension] = module.__dict__.get("_gift_extensions", {})
    if method.name in own:
        raise AdaptationError(f"it is extended already, by {own[method.name].method}")
    values = method.init(module)
    names = {key: f"{method.name}_{key}" for key in values}
    taken = [name for name in names.values() if hasattr(module, name)]
    if taken:
        raise AdaptationError(f"it has attributes {taken} already, which this would hide")
    for key, value in values.items():
        add_tensor(module, names[key], value)
    module.__dict__["_gift_extensions"] = own | {method.name: Extension(names, method=method)}
    # Fused kernels that compute a whole block without calling its parts look for hooks only.
    module.register_forward_hook(_seen)
    change_class(module, extended=True)


def _seen(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing but be there."""


def release_extensions(module: nn.Module) -> None:
    """Undo `extend_module`, whose parameters are gone already."""
    if module.__dict__.pop("_gift_extensions", None) is None:
        return
    for key, hook in list(module._forward_hooks.items()):
        if hook is _seen:
            del module._forward_hooks[key]
    if spec_of(module).extended:
        change_class(module, extended=False)
