"""Modules with adapted tensors.

The module stays the object that it was. Its class becomes a generated subclass of its own class in
which the tensor's name is a property that gives the effective weight; the frozen tensor stays in
``_parameters`` under its name, and the new parameters stand beside it. Whoever reads
``module.weight`` therefore sees the adapted weight: the layer's own forward, fused kernels, outer
modules and user code alike.
"""

from typing import Any

from torch import Tensor

from gift.adapter import Adapter, plain_tensor
from gift.delta import DeltaModule, as_plain
from gift.generated import Generated, Spec, contributes, generated_class
from gift.layers import row_of
from gift.methods import METHODS
from gift.methods.base import dotted
from gift.quantised import is_quantised, same_values


class AdaptedModule(DeltaModule):
    """What every module with an adapted tensor gains."""

    _gift_adapters: dict[str, Adapter]

    def _gift_frozen(self, tensor: str) -> Tensor:
        """The frozen tensor: a parameter, or what a parametrization or hook computed."""
        return plain_tensor(self, tensor)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        adapted = name in self.__dict__.get("_gift_adapters", ())
        if adapted and is_quantised(value) and not is_quantised(self._gift_frozen(name)):
            raise RuntimeError(
                f"{name!r} is adapted: quantise it before enable_fine_tuning, for what is "
                "quantised now is the effective weight, delta and all"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._gift_adapters:  # what reparametrises a weight begins like this
            raise _reparametrised(name)
        super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        changed = [t for t in self._gift_adapters if self._gift_changes(t, state_dict, prefix)]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for tensor in changed:
            self._gift_adapters[tensor].follow(self, tensor)

    def _gift_changes(self, tensor: str, state_dict: Any, prefix: str) -> bool:
        """Whether a state brings other values for a frozen tensor from which a delta was made."""
        adapter, new = self._gift_adapters[tensor], state_dict.get(prefix + tensor)
        if new is None or not adapter.method.reads_weight or adapter.is_on_meta(self):  # type: ignore[arg-type]
            return False
        now = self._parameters.get(tensor)  # type: ignore[attr-defined]
        return now is not None and (now.is_meta or not same_values(now, new.to(now.device)))


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
    if fast := _fast_forward(plain, spec):
        mixins.append(fast)
    namespace: dict[str, Any] = {tensor: _effective(tensor) for tensor, _ in spec.tensors}
    if hasattr(plain, "reset_parameters"):
        namespace["reset_parameters"] = _reset_parameters
    if hasattr(plain, "initialize_parameters"):
        namespace["initialize_parameters"] = _initialize_parameters
    if getattr(plain, "cls_to_become", None) is not None:
        namespace["cls_to_become"] = generated_class(plain.cls_to_become, spec)  # type: ignore[attr-defined]
    return mixins, namespace


def _fast_forward(plain: type, spec: Spec) -> type | None:
    method = dict(spec.tensors).get("weight")
    if method is None:
        return None
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: import the file that registers it first")
    fast = METHODS[method].forwards.get(dotted(plain.forward))  # type: ignore[attr-defined]
    return None if fast is None else type("FastForward", (Generated,), {"forward": fast})
