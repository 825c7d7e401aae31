"""Adapting one tensor of one module in place.

The module stays the object that it was. Its class becomes a generated subclass of its own class in
which the tensor's name is a property that gives the effective weight; the frozen tensor stays in
``_parameters`` under its name, and the new parameters stand beside it. Whoever reads
``module.weight`` therefore sees the adapted weight: the layer's own forward, fused kernels, outer
modules and user code alike.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from gift.generated import Generated, Spec, change_class, contributes, generated_class, plain_class
from gift.layers import Layout, LayoutOptions, layout_of, row_of
from gift.methods import METHODS, AdaptationError, Method
from gift.methods.base import dotted


@dataclass
class Adapter:
    """What a module knows of one adapted tensor of its own.

    Args:
        method: the method, fitted to the tensor's shape once that is known.
        options: the choice of layouts.
        names: from the method's parameter names to those on the module.
        layout: how the tensor is read as a matrix; None while a lazy tensor has no shape.
        owner: the module that holds the delta where the tensor is tied, None for itself.
    """

    method: Method
    options: LayoutOptions
    names: dict[str, str] = field(default_factory=dict)
    layout: Layout | None = None
    owner: nn.Module | None = None

    def delta_of(self, module: nn.Module) -> tuple[Method, dict[str, Tensor]]:
        """The method and its parameters for the adapted tensor of `module`."""
        holder = module if self.owner is None else self.owner
        return self.method, {key: getattr(holder, name) for key, name in self.names.items()}

    def weight(self, module: nn.Module, frozen: Tensor) -> Tensor:
        """The effective weight, in the frozen one's dtype, rounded once."""
        if self.layout is None or _is_sharded(frozen):
            return frozen
        method, parameters = self.delta_of(module)
        if module.training:
            parameters = method.drop(parameters, self.layout.input_axis)
        matrix = self.layout.to_matrix(frozen).to(method.delta_dtype(frozen))
        return self.layout.to_weight(method.weight(matrix, parameters)).to(frozen.dtype)

    def delta_weight(self, module: nn.Module) -> Tensor:
        """What an additive method adds to the weight, in the weight's shape."""
        method, parameters = self.delta_of(module)
        assert self.layout is not None
        return self.layout.to_weight(method.delta(parameters))  # type: ignore[attr-defined]

    def is_on_meta(self, module: nn.Module) -> bool:
        """Whether the delta is held by `module` and has no values yet."""
        return self.owner is None and any(
            module._parameters[name].is_meta  # type: ignore[union-attr]
            for name in self.names.values()
        )

    def reset(self, module: nn.Module, tensor: str) -> None:
        """Give the delta its initial values, and a shape where it had none yet."""
        if self.owner is not None:
            self.layout = self.owner._gift_adapters[tensor].layout  # type: ignore[operator,index]
            return
        frozen = module._gift_frozen(tensor)  # type: ignore[operator]
        if is_lazy(frozen):
            return
        if self.layout is None:
            self.layout = layout_of(module, tensor, frozen.shape, self.options)
            self.method = self.method.fit(self.layout.matrix)
        with torch.no_grad():
            for key, value in self.method.init(self.layout.to_matrix(frozen.detach())).items():
                parameter = module._parameters[self.names[key]]
                if is_lazy(parameter):
                    parameter.materialize(value.shape, value.device, value.dtype)  # type: ignore[union-attr]
                elif parameter.device != value.device:  # type: ignore[union-attr]
                    parameter = nn.Parameter(torch.empty_like(value), parameter.requires_grad)  # type: ignore[union-attr]
                    module._parameters[self.names[key]] = parameter
                parameter.copy_(value)  # type: ignore[union-attr]


def _is_sharded(tensor: Tensor) -> bool:
    # FSDP2 asks a module for its leaf while the parameters are sharded; the effective weight exists
    # only between unshard and reshard, when the parameters are plain tensors.
    return hasattr(tensor, "device_mesh")


class AdaptedModule(Generated):
    """What every module with an adapted tensor gains."""

    _gift_adapters: dict[str, Adapter]

    def _gift_frozen(self, tensor: str) -> Tensor:
        """The frozen tensor: a parameter, or what a parametrization or hook computed."""
        return _plain_tensor(self, tensor)  # type: ignore[arg-type]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or train the deltas; the frozen tensors stay frozen."""
        frozen = {id(self._parameters.get(name)) for name in self._gift_adapters}  # type: ignore[attr-defined]
        for parameter in nn.Module.parameters(self):  # type: ignore[arg-type]
            if id(parameter) not in frozen:
                parameter.requires_grad = requires_grad
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `to_empty` gives a network from the meta device memory without values: fill the delta's.
        waiting = [t for t, a in self._gift_adapters.items() if a.is_on_meta(self)]  # type: ignore[arg-type]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for tensor in waiting:
            self._gift_adapters[tensor].reset(self, tensor)  # type: ignore[arg-type]
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *rest: Any
    ) -> None:
        *_, errors = rest
        problems = settings_misfits(self, prefix.rstrip("."), metadata)  # type: ignore[arg-type]
        errors += problems
        if not problems:
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[misc]


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
        if frozen is None or is_lazy(frozen):
            return frozen
        try:
            return self._gift_adapters[tensor].weight(self, frozen)
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the frozen tensor, silently.
            raise RuntimeError(f"the effective {tensor!r} cannot be computed: {error}") from error

    def write(self: Any, value: Any) -> None:
        # Only values that are no parameters come here: a hook that recomputes the tensor.
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
    names = [n for a in adapters_of(module).values() if a.owner is None for n in a.names.values()]
    deltas = {name: module._parameters.pop(name) for name in names}
    if "_gift_plain" in vars(adapted):
        module.__class__ = plain_class(adapted)
    try:
        yield
    finally:
        module.__class__ = adapted
        module._parameters.update(deltas)


# --- adapting ----------------------------------------------------------------------------------


def adapters_of(module: nn.Module) -> Mapping[str, Adapter]:
    """The adapted tensors of `module` itself, by name."""
    return module.__dict__.get("_gift_adapters", {})


def settings_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Method and settings of each adapted tensor of `module`, as plain values."""
    return {
        t: {"method": a.method.name} | a.method.settings for t, a in adapters_of(module).items()
    }


def settings_misfits(module: nn.Module, path: str, metadata: Mapping[str, Any]) -> list[str]:
    """What a state's metadata says of a delta, where it is not what `module` has."""
    here, there = settings_of(module), metadata.get("gift")
    if there is None or not here or here == there:
        return []
    return [f"{path or 'the network'} was trained with {there}, here it has {here}"]


def _plain_tensor(module: nn.Module, tensor: str) -> Any:
    value = module._parameters.get(tensor)
    if value is None:
        value = module.__dict__.get(tensor)
    if value is None:
        computed = getattr(plain_class(type(module)), tensor, None)
        value = computed.fget(module) if isinstance(computed, property) else None  # type: ignore[misc]
    return value


def adapt_tensor(module: nn.Module, tensor: str, method: Method, options: LayoutOptions) -> None:
    """Adapt one tensor of `module`; the tensor is frozen, its new parameters are trainable.

    Args:
        module: the module that holds it.
        tensor: its name, as in ``module.weight``.
        method: what becomes of it.
        options: the choice of layouts.

    Raises:
        AdaptationError: if it cannot be adapted; nothing is changed then.
    """
    frozen = _plain_tensor(module, tensor)
    _check(module, tensor, frozen)
    adapter = Adapter(method, options)
    if is_lazy(frozen):
        probe = torch.empty(_LAZY_PROBE, device="meta")  # for the names of the parameters alone
        names = method.fit(_LAZY_PROBE).init(probe)
        values: dict[str, Tensor | None] = dict.fromkeys(names)
    else:
        adapter.layout = layout_of(module, tensor, frozen.shape, options)
        adapter.method = method.fit(adapter.layout.matrix)
        with torch.no_grad():
            values = dict(adapter.method.init(adapter.layout.to_matrix(frozen.detach())))
        _check_shape(adapter, frozen, values)
    prefix = "" if tensor == "weight" else f"{tensor}_"
    adapter.names = {key: prefix + key for key in values}
    taken = [name for name in adapter.names.values() if hasattr(module, name)]
    if taken:
        raise AdaptationError(f"it has attributes {taken} already, which the delta would hide")
    install(module, tensor, adapter)
    for key, value in values.items():
        parameter = UninitializedParameter() if value is None else nn.Parameter(value)
        module.register_parameter(adapter.names[key], parameter)
    if isinstance(frozen, nn.Parameter):
        frozen.requires_grad = False


def install(module: nn.Module, tensor: str, adapter: Adapter) -> None:
    """Let `module` read its tensor through `adapter`."""
    module.__dict__.setdefault("_gift_adapters", {})[tensor] = adapter
    tensors = tuple(sorted((t, a.method.name) for t, a in adapters_of(module).items()))
    change_class(module, tensors=tensors)


def _check(module: nn.Module, tensor: str, frozen: Any) -> None:
    if tensor in adapters_of(module):
        method = adapters_of(module)[tensor].method
        raise AdaptationError(f"{tensor!r} is adapted already, by {method}; one tensor takes one")
    if not isinstance(frozen, Tensor):
        have = [name for name, p in module._parameters.items() if p is not None]
        raise AdaptationError(f"it has no tensor {tensor!r}; it has {have}")
    if not (frozen.is_floating_point() or frozen.is_complex()):
        raise AdaptationError(
            f"{tensor!r} is {frozen.dtype}, expected a floating-point or complex tensor "
            "(a quantised weight cannot be read as a matrix: adapt before quantising)"
        )
    if _is_sharded(frozen):
        raise AdaptationError(f"{tensor!r} is sharded already: enable fine-tuning before sharding")
    if not is_lazy(frozen) and frozen.numel() == 0:
        raise AdaptationError(f"{tensor!r} has no elements, its shape is {tuple(frozen.shape)}")


_LAZY_PROBE = (2**16, 2**16)
_checked: set[tuple[type[Method], int, torch.dtype]] = set()


def _check_shape(adapter: Adapter, frozen: Tensor, values: Mapping[str, Any]) -> None:
    """That a method keeps shape and dtype: on the first matrix of each kind that it meets."""
    assert adapter.layout is not None
    key = (type(adapter.method), len(adapter.layout.matrix), frozen.dtype)
    if key in _checked:
        return
    matrix = adapter.layout.to_matrix(frozen).to(adapter.method.delta_dtype(frozen))
    with torch.no_grad():
        result = adapter.method.weight(matrix, values)
    if result.shape != matrix.shape or result.dtype != matrix.dtype:
        raise AdaptationError(
            f"{adapter.method} makes {tuple(result.shape)} {result.dtype} of a matrix "
            f"{tuple(matrix.shape)} {matrix.dtype}; a method must keep both"
        )
    _checked.add(key)


def adapt_module(
    module: nn.Module, method: Method, options: LayoutOptions, train_bias: bool = False
) -> None:
    """Adapt every weight in `module` and below it that `gift.layers` knows; freeze all else there.

    Args:
        module: a layer, or any module with layers inside.
        method: what becomes of each weight.
        options: the choice of layouts.
        train_bias: also train the biases of the layers that are adapted.

    Raises:
        AdaptationError: naming each weight that cannot be adapted, or if there is none at all.
    """
    problems, found = [], False
    for parameter in module.parameters():
        parameter.requires_grad = False
    for path, part in module.named_modules():
        row = row_of(plain_class(type(part)))
        if row is None:
            continue
        for tensor in row.names(part, row.weights):
            found = True
            try:
                adapt_tensor(part, tensor, method, options)
            except AdaptationError as error:
                problems.append(f"{path}.{tensor}: {error}".lstrip("."))
        if train_bias:
            for name in row.names(part, row.biases):
                if (bias := part._parameters.get(name)) is not None:
                    bias.requires_grad = True
    if not found:
        raise AdaptationError(
            f"{type(module).__name__} has no weight of a known layer type; a raw parameter is "
            "adapted by a parameter cap with pa_adapt"
        )
    if problems:
        raise AdaptationError("; ".join(problems))


def release_tensors(module: nn.Module) -> None:
    """Undo `adapt_tensor` for all tensors of `module`."""
    for adapter in adapters_of(module).values():
        if adapter.owner is None:
            for name in adapter.names.values():
                del module._parameters[name]
    if module.__dict__.pop("_gift_adapters", None) is None:
        return
    adapted = type(module)
    change_class(module, tensors=())
    if hasattr(adapted, "restored"):
        adapted.restored(module)
