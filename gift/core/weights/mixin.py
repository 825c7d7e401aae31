"""Modules with adapted tensors.

The module stays the same object. Its class becomes a generated subclass, in which the tensor's name
is a property that returns the effective weight. The frozen tensor stays in ``_parameters`` under
its name, and the new parameters are stored beside it. All code that reads ``module.weight``
therefore sees the adapted weight: the layer's own forward, fused kernels, outer modules and user
code.
"""

import inspect
from collections.abc import MutableMapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import TensorWeakRef

from gift.core.delta import DeltaModule, as_plain
from gift.core.dynamic_class import Generated, Spec, generated_class, plain_class
from gift.core.movers import moves
from gift.core.weights.calls import one_call
from gift.core.weights.effective import EffectiveWeight, refused
from gift.core.weights.frozen import plain_tensor
from gift.core.weights.record import WeightDelta
from gift.errors import AdaptationError
from gift.kernels.conv_layers import effective_conv_forwards
from gift.kernels.effective_linear import Made, effective_forwards
from gift.kernels.stacked import stacked_forwards
from gift.kernels.torch_state import for_every_tensor
from gift.layers.table import dotted, row_of
from gift.methods import METHODS
from gift.private.torch.tracing import is_transformed
from gift.quantization import is_quantised, same_values
from gift.support.sharding import is_sharded

EFFECTIVE = effective_forwards() | effective_conv_forwards()
STACKED = stacked_forwards()


class AdaptedModule(DeltaModule):
    """Mixin of every module with an adapted tensor."""

    _gift_weights: dict[str, WeightDelta]

    def _gift_frozen(self, tensor: str) -> Tensor:
        """The frozen tensor: a parameter, or the result of a parametrization or hook."""
        frozen: Tensor = plain_tensor(self, tensor)
        return frozen

    def _gift_weight(self, tensor: str, once: bool = False) -> Any:
        """The tensor that the module computes with: the effective weight, if it is adapted.

        Args:
            tensor: its name.
            once: whether the call reads it only once, so that it need not be cached.
        """
        delta = self._gift_weights.get(tensor)
        if delta is None:
            own = self._parameters  # `getattr` takes ten times as long
            return own[tensor] if tensor in own else getattr(self, tensor, None)
        frozen = self._gift_frozen(tensor)
        if frozen is None:
            return None
        try:
            make = delta.weight if once else delta.read
            return make(self, frozen)
        except AttributeError as error:
            # An AttributeError in a property makes Python call ``nn.Module.__getattr__``, which
            # would silently return the frozen tensor.
            raise RuntimeError(f"the effective {tensor!r} cannot be computed: {error}") from error

    def _gift_made(self, tensor: str) -> Made | None:
        """The effective weight in parts, for a forward function that does not save it."""
        return self._gift_weights[tensor].made(self, self._gift_frozen(tensor))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and value is self._gift_plain and is_parametrized(value):
            # The last parametrization was removed: torch sets the first base of the module's class.
            # That is the class that torch generated, as gift's class is derived from it. Go on to
            # the base of torch's class.
            value = generated_class(value.__bases__[0], self._gift_spec)
        if name in self.__dict__.get("_parameters", ()) and moves(inspect.currentframe()):
            self._parameters[name] = value
            return
        if name in self.__dict__.get("_gift_weights", ()):
            self._gift_check_new(name, value)
        super().__setattr__(name, value)
        if name in self.__dict__.get("_gift_weights", ()):
            self._gift_note_sources()

    def register_parameter(self, name: str, param: Any) -> None:
        """Register a parameter as `nn.Module` does, but refuse values that contain a delta."""
        source = name.removesuffix("_g")  # the old `weight_norm` registers `weight_g` first
        if type(param) is EffectiveWeight or (
            source != name and source in self._gift_weights and _put_back(self, source)
        ):
            raise _reparametrised(source.removesuffix("_orig"))  # pruning's first step
        if name in self._gift_weights:
            self._gift_check_new(name, param)
        if is_sharded(param):
            param = self._gift_spread(name, param)
        super().register_parameter(name, param)

    def _gift_spread(self, name: str, param: Any) -> Any:
        """What tensor parallelism puts in the place of a tensor: its parts, where they must lie.

        It may have made `param` of the effective weight, or cut a delta as it cuts the weight.
        """
        now: Any = self._parameters.get(name)
        if now is None or is_sharded(now):
            return param
        for tensor, delta in self._gift_weights.items():
            frozen = self._parameters.get(tensor)
            if name == tensor and delta.owner in (None, self):
                try:
                    return delta.spread(now, param)
                except AdaptationError as error:
                    kind = plain_class(type(self)).__name__
                    raise AdaptationError(f"{kind}, {tensor}: {error}") from None
            if name in delta.names.values() and not delta.bias_of and delta.mesh_axes:
                return delta.spread_tensor(frozen, name, now)
        param.requires_grad = now.requires_grad
        return param

    def _gift_check_new(self, tensor: str, value: Any) -> None:
        """Refuse an assignment to an adapted tensor.

        Allowed are the frozen tensor itself and a tensor that comes from a state. Sharded
        parameters are also allowed, because FSDP2 exchanges parts of a parameter for the whole, and
        back.
        """
        now = self._gift_frozen(tensor)
        if is_quantised(value) and not is_quantised(now):
            raise RuntimeError(
                f"{tensor!r} is adapted: quantise it before enable_fine_tuning, since now the "
                "effective weight would be quantised, with the delta"
            )
        is_new = value is None or isinstance(value, nn.Parameter)
        may = value is now or is_sharded(now) or is_sharded(value) or is_quantised(value)
        if is_new and not may and "_gift_loading" not in vars(self):
            name = f"{plain_class(type(self)).__name__}.{tensor}"
            raise refused(name, "assigning to it")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._gift_note_sources()

    def _gift_copied(self) -> None:
        super()._gift_copied()
        self._gift_note_sources()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self._gift_note_sources()
        return result

    def _gift_note_sources(self) -> None:
        """Record where frozen tensors are now; what was derived from them is still valid."""
        # It is None in a copy that is made only to look at it, see `gift.core.merging`.
        for tensor, delta in (self._gift_weights or {}).items():
            delta.note_source(self, tensor)

    def __delattr__(self, name: str) -> None:
        if name in self._gift_weights:  # the first step of reparametrising a weight
            raise _reparametrised(name)
        super().__delattr__(name)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        changed = [t for t in self._gift_weights if self._gift_changes(t, state_dict, prefix)]
        within = vars(self).get("_gift_loading", False)  # the network may be this module itself
        vars(self)["_gift_loading"] = True  # it may assign to parameters
        try:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        finally:
            if not within:
                del vars(self)["_gift_loading"]
        for tensor in changed:
            self._gift_weights[tensor].rederive(self, tensor)
        self._gift_note_sources()

    def _gift_changes(self, tensor: str, state_dict: MutableMapping[str, Any], prefix: str) -> bool:
        """Whether a state changes the values of a frozen tensor from which a delta was made."""
        delta, new = self._gift_weights[tensor], state_dict.get(prefix + tensor)
        if new is None or not delta.reads_weight or delta.is_on_meta(self):
            return False
        now = self._parameters.get(tensor)
        return now is not None and (now.is_meta or not same_values(now, new.to(now.device)))


def _reparametrised(tensor: str) -> RuntimeError:
    return RuntimeError(
        f"{tensor!r} is adapted and cannot be parametrised or replaced now: do that before "
        "enable_fine_tuning, or after disable_fine_tuning"
    )


def _put_back(module: Any, tensor: str) -> bool:
    """Put a frozen tensor back that was just removed by code holding the effective weight."""
    reader = module._gift_weights[tensor].memory.reader()
    if tensor in module._parameters or reader is None:
        return False
    parameters = module._parameters
    now, order = {**parameters, tensor: reader._gift_frozen}, reader._gift_order
    parameters.clear()
    parameters.update({name: now.pop(name) for name in order if name in now} | now)
    return True


def is_parametrized(cls: type) -> bool:
    """Whether torch generated the class for a module with parametrizations."""
    return cls.__module__ == parametrize.__name__


def _take_property(cls: Any, name: str) -> None:
    """Delete a property as torch does when it removes a parametrization; refuse adapted ones."""
    if name in dict(cls._gift_spec.tensors):
        raise _reparametrised(name)
    delattr(cls._gift_plain, name)


def _reset_parameters(self: Any) -> None:
    """Reset the layer with its own method, then the delta."""
    with as_plain(self):
        self.reset_parameters()
    for tensor, delta in self._gift_weights.items():
        delta.reset(self, tensor)


def _initialize_parameters(self: Any, *args: Any, **kwargs: Any) -> None:
    """Let a lazy module infer its shapes, then initialize the delta with them."""
    with as_plain(self):
        self.initialize_parameters(*args, **kwargs)
    for tensor, delta in self._gift_weights.items():
        if delta.layout is None:
            delta.reset(self, tensor)


_REPARAMETRISING = frozenset(
    function.__code__
    for function in (parametrize.register_parametrization, parametrize.remove_parametrizations)
)  # they read a tensor before they change it


def _asks_to_reparametrise(reader: FrameType | None) -> bool:
    """Whether the reader of a property is about to change what the tensor is computed from."""
    caller = None if reader is None else reader.f_back
    return caller is not None and caller.f_code in _REPARAMETRISING


def _effective(tensor: str) -> property:
    def read(self: Any) -> Any:
        if not torch.compiler.is_compiling():
            # A variable for the frame would make it hold itself, and with it the weight.
            if moves(inspect.currentframe()):
                return self._gift_frozen(tensor)
            if _asks_to_reparametrise(inspect.currentframe()):
                raise _reparametrised(tensor)
        weight = self._gift_weight(tensor)
        if torch.compiler.is_compiling() or type(weight) is not Tensor or is_transformed():
            return weight
        guarded: Any = EffectiveWeight.of(weight, f"{plain_class(type(self)).__name__}.{tensor}")
        if tensor in self._parameters and guarded is not weight:
            delta, frozen = self._gift_weights[tensor], self._parameters[tensor]
            guarded._gift_frozen, guarded._gift_order = frozen, tuple(self._parameters)
            delta.memory.reader = TensorWeakRef(guarded)
            guarded._gift_made = getattr(weight, "_gift_made", None)
            guarded._gift_source = self, delta
            if weight.requires_grad:
                guarded._gift_slices = delta.slices(self, frozen)
        return guarded

    def write(self: Any, value: object) -> None:
        # nn.Module passes only non-parameters on to a property: a hook recomputed the tensor.
        if tensor not in self.__dict__:
            raise _reparametrised(tensor)
        self.__dict__[tensor] = value

    return property(read, write, doc=f"The effective `{tensor}`: frozen tensor and delta.")


class Called(Generated):
    """Mixin of the network, and of modules that may read an adapted tensor many times."""

    _gift_reads_often = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module as its own class does."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        if not isinstance(self, Called):  # a reference to this method outlived the class
            return self(*args, **kwargs)
        with one_call(self, self._gift_reads_often):
            return super().__call__(*args, **kwargs)


class ReadsOften(Called):
    """Mixin of a module whose forward is not torch's, so it may read a weight in a loop."""

    _gift_reads_often = True


def called_feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Mark calls, within which an effective weight is made once."""
    forward = getattr(plain, "forward", None)
    if spec.tensors and not getattr(forward, "__module__", "").startswith("torch.nn."):
        return [ReadsOften], {}
    return ([Called], {}) if spec.network else ([], {})


def adapted_feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Turn adapted tensors into properties, and add the method's fast path if it has one."""
    if not spec.tensors:
        return [], {}
    mixins: list[type] = [AdaptedModule]
    row = row_of(plain)
    if row is not None and row.mixin is not None:
        mixins.append(row.mixin)
    if fast := _fast_forward(plain, spec):
        mixins.append(fast)
    namespace: dict[str, Any] = {tensor: _effective(tensor) for tensor, _ in spec.tensors}
    if is_parametrized(plain):
        namespace["_gift_delete"] = _take_property
    if hasattr(plain, "reset_parameters"):
        namespace["reset_parameters"] = _reset_parameters
    if hasattr(plain, "initialize_parameters"):
        namespace["initialize_parameters"] = _initialize_parameters
    # A lazy module sets its class to `cls_to_become` once it has shapes: keep it a generated one.
    if getattr(plain, "cls_to_become", None) is not None:
        namespace["cls_to_become"] = generated_class(plain.cls_to_become, spec)  # type: ignore[attr-defined]
    return mixins, namespace


def _fast_forward(plain: type[nn.Module], spec: Spec) -> type | None:
    stack = dict(spec.tensors).get("weight")
    if stack is None:
        return None
    methods = stack.split("+")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: import the file that registers it first")
    name = dotted(plain.forward)
    forwards = METHODS[methods[0]].forwards if len(methods) == 1 else STACKED
    fast = forwards.get(name, EFFECTIVE.get(name))
    if fast is None:
        return None
    forward = for_every_tensor(fast, plain.forward)
    return type("FastForward", (Generated,), {"forward": forward})
