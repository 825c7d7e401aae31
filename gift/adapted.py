"""Modules with adapted tensors.

The module stays the object that it was. Its class becomes a generated subclass of its own class in
which the tensor's name is a property that gives the effective weight; the frozen tensor stays in
``_parameters`` under its name, and the new parameters stand beside it. Whoever reads
``module.weight`` therefore sees the adapted weight: the layer's own forward, fused kernels, outer
modules and user code alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gift.adapter import Adapter, adapters_of, added_names, plain_tensor, settings_misfits
from gift.generated import Generated, Spec, contributes, generated_class, plain_class
from gift.layers import row_of
from gift.methods import METHODS
from gift.methods.base import dotted


class AdaptedModule(Generated):
    """What every module with an adapted tensor gains."""

    _gift_adapters: dict[str, Adapter]

    def _gift_frozen(self, tensor: str) -> Tensor:
        """The frozen tensor: a parameter, or what a parametrization or hook computed."""
        return plain_tensor(self, tensor)  # type: ignore[arg-type]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or train the deltas; the frozen tensors stay frozen."""
        modules = list(self.modules())  # type: ignore[attr-defined]
        frozen = {id(m._parameters.get(name)) for m in modules for name in adapters_of(m)}
        for parameter in nn.Module.parameters(self):  # type: ignore[arg-type]
            if id(parameter) not in frozen:
                parameter.requires_grad = requires_grad
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `to_empty` gives a network from the meta device memory without values: fill the delta's.
        waiting = [t for t, a in self._gift_adapters.items() if a.is_on_meta(self)]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for tensor in waiting:
            self._gift_adapters[tensor].reset(self, tensor)
        return self

    def __delattr__(self, name: str) -> None:
        if name in self._gift_adapters:  # what reparametrises a weight begins like this
            raise _reparametrised(name)
        super().__delattr__(name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *rest: Any
    ) -> None:
        *_, errors = rest
        problems = settings_misfits(self, prefix.rstrip("."), metadata)  # type: ignore[arg-type]
        errors += problems
        if not problems:
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[misc]


def _reparametrised(tensor: str) -> RuntimeError:
    return RuntimeError(
        f"{tensor!r} is adapted and cannot be parametrised or replaced now: do that before "
        "enable_fine_tuning, or after disable_fine_tuning"
    )


def _reset_parameters(self: Any) -> None:
    """Reset the layer as its own class does, then the delta."""
    with as_plain(self):
        self.reset_parameters()
    for tensor, adapter in self._gift_adapters.items():
        adapter.reset(self, tensor)


def _initialize_parameters(self: Any, *args: Any, **kwargs: Any) -> None:
    """A lazy module learns its shapes, and with them the delta does."""
    with as_plain(self):
        self.initialize_parameters(*args, **kwargs)
    for tensor, adapter in self._gift_adapters.items():
        if adapter.layout is None:
            adapter.reset(self, tensor)


def _effective(tensor: str) -> property:
    def read(self: Any) -> Any:
        frozen = self._gift_frozen(tensor)
        if frozen is None:
            return frozen
        try:
            return self._gift_adapters[tensor].weight(self, frozen)
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the frozen tensor, silently.
            raise RuntimeError(f"the effective {tensor!r} cannot be computed: {error}") from error

    def write(self: Any, value: Any) -> None:
        # Only values that are no parameters come here: a hook that recomputes the tensor.
        if tensor not in self.__dict__:
            raise _reparametrised(tensor)
        self.__dict__[tensor] = value

    return property(read, write, doc=f"The effective `{tensor}`: frozen tensor and delta.")


@contributes
def _adapted_parts(plain: type, spec: Spec) -> tuple[list[type], dict[str, Any]]:
    if not spec.tensors:
        return [], {}
    mixins: list[type] = [AdaptedModule]
    row = row_of(plain)
    if row is not None and row.mixin is not None:
        mixins.append(row.mixin)
    namespace: dict[str, Any] = {tensor: _effective(tensor) for tensor, _ in spec.tensors}
    namespace |= _fast_forward(plain, spec)
    if hasattr(plain, "reset_parameters"):
        namespace["reset_parameters"] = _reset_parameters
    if hasattr(plain, "initialize_parameters"):
        namespace["initialize_parameters"] = _initialize_parameters
    if getattr(plain, "cls_to_become", None) is not None:
        namespace["cls_to_become"] = generated_class(plain.cls_to_become, spec)  # type: ignore[attr-defined]
    return mixins, namespace


def _fast_forward(plain: type, spec: Spec) -> dict[str, Any]:
    method = dict(spec.tensors).get("weight")
    if method is None:
        return {}
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: import the file that registers it first")
    fast = METHODS[method].forwards.get(dotted(plain.forward))  # type: ignore[attr-defined]
    return {} if fast is None else {"forward": fast}


@contextmanager
def as_plain(module: nn.Module) -> Iterator[None]:
    """Within it, `module` is as if it had never been adapted: plain class, no deltas."""
    adapted = type(module)
    deltas = {name: module._parameters.pop(name) for name in added_names(module)}
    if "_gift_plain" in vars(adapted):
        module.__class__ = plain_class(adapted)
    try:
        yield
    finally:
        module.__class__ = adapted
        module._parameters.update(deltas)
