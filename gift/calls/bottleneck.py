"""Bottleneck adapters: a small network beside or after a module, added to what it gives."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.calls.arguments import in_order
from gift.calls.features import Features, features_of, weight_beside
from gift.calls.tensors import first_tensor, with_first_changed
from gift.extension import CallMethod, Forward, where
from gift.methods import AdaptationError
from gift.methods.settings import choice, flag, is_integer, number, probability, setting, whole
from gift.private.torch import CONV, CONV_TRANSPOSE

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Bottleneck(CallMethod):
    """Bottleneck adapter after any module ``f``, or beside it.

    Sequential (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) and parallel (He et al. 2022,
    https://arxiv.org/abs/2110.04366), with ``z`` what the module gives or what it takes::

        h' = f(x) + s * (W_up act(W_down z + b_down) + b_up),    z = f(x)  or  z = x

    It adds ``down_weight (size, d_z)``, ``down_bias (size)``, ``up_weight (d, size)`` and
    ``up_bias (d)``, which are ``size * (d_z + d + 1) + d`` parameters. `W_up` and both biases start
    at zero, so that the module gives what it gave bit for bit until the first step.

    What the module gives may be a tensor, or a tuple, list, mapping or dataclass, whose first
    tensor is changed. Where activations are not finite, they pass as they are.

    The module must be called: one whose parent reads its weight instead, as a fused kernel does,
    never comes to its extension.

    Args:
        size: width of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        scaling: the factor `s`; the paper of the parallel form uses 4.
        parallel: see what the module takes, its first tensor, instead of what it gives.
        dropout: probability of dropout on the bottleneck, in training mode.
        dim: number of features; None finds it in the module: the last layer in registration order
            tells what it gives, the first one what it takes.
        axis: the axis along which the features lie; None finds it likewise: the last one, but the
            channels of convolutions and of batch, group and instance norms.
        dtype: of the new parameters, or its name; None means that of the module, but at least
            float32. The result is rounded once, to the dtype of what the module gives.

    Raises:
        ValueError: for settings out of range; all of them are named.
    """

    name: ClassVar[str] = "bottleneck"
    size_setting: ClassVar[str | None] = "size"

    size: int = whole(16)
    activation: str = choice(*ACTIVATIONS)
    scaling: float = number(1.0)
    parallel: bool = flag()
    dropout: float = probability()
    dim: int | None = whole(None, enters_weight=False, kw_only=True)
    axis: int | None = setting(None, "an integer", is_integer, kw_only=True, found=True)

    def fit(self, module: nn.Module) -> Self:
        """The same with the axis of the module's features."""
        features = self._features(module)
        if self.parallel and isinstance(module, CONV) and _changes_size(module):
            raise AdaptationError(
                "what it takes and what it gives differ in more than their channels (stride, "
                "padding): a parallel bottleneck cannot be added, a sequential one can"
            )
        return replace(self, axis=features.axis)

    def _features(self, module: nn.Module) -> Features:
        features = features_of(module, self.dim, self.axis)
        if self.parallel and features.inputs is None:
            raise AdaptationError(
                "it takes no features that are known, as an embedding does: a parallel bottleneck "
                "needs them (a sequential one would work, or dim= if it takes as many as it gives)"
            )
        return features

    def init(self, module: nn.Module) -> dict[str, Tensor]:
        """`W_down` is Kaiming-uniform as in ``nn.Linear``, all else zero."""
        features, weight = self._features(module), weight_beside(module)
        if weight is not None and weight.is_complex():
            raise AdaptationError("its parameters are complex, expected real features")
        like = self.beside(weight)
        inputs = features.inputs if self.parallel else features.outputs
        assert inputs is not None
        down = torch.empty(self.size, inputs, **like)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return {
            "down_weight": down,
            "down_bias": torch.zeros(self.size, **like),
            "up_weight": torch.zeros(features.outputs, self.size, **like),
            "up_bias": torch.zeros(features.outputs, **like),
        }

    def has_effect(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether `W_up` or its bias is no longer zero."""
        return any(bool(parameters[key].any()) for key in ("up_weight", "up_bias"))

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """``h'``."""
        beside = None
        if self.parallel:  # before the module, which may change its input in place
            names: Any = module._gift_arguments
            x = first_tensor(in_order(names, args, kwargs))
            if x is None:
                raise AdaptationError(f"{where(module, self.name)} takes no tensor")
            beside = self._delta(module, parameters, x, "down_weight", "takes")

        def change(output: Tensor) -> Tensor:
            delta = beside
            if delta is None:
                delta = self._delta(module, parameters, output, "up_weight", "gives")
            return self._added(module, output, delta)

        changed = with_first_changed(forward(*args, **kwargs), change)
        if changed is None:
            raise AdaptationError(f"{where(module, self.name)} gives no tensor to change")
        return changed

    def _added(self, module: nn.Module, output: Tensor, delta: Tensor) -> Tensor:
        if output.is_nested and delta.is_nested:
            pairs = zip(output.unbind(), delta.unbind(), strict=True)
            return torch.nested.as_nested_tensor([self._added(module, *pair) for pair in pairs])
        if delta.shape != output.shape:
            raise AdaptationError(
                f"{where(module, self.name)} gives {tuple(output.shape)}, the bottleneck beside it "
                f"{tuple(delta.shape)}: take a sequential one (parallel=False)"
            )
        # As a difference: f(x) + 0.0 is no longer f(x) where that is -0.0, f(x) - 0.0 is.
        return (output - (0.0 - self.scaling * delta)).to(output.dtype)

    def _delta(
        self, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, key: str, verb: str
    ) -> Tensor:  # fmt: skip
        """``W_up act(W_down x + b_down) + b_up``; `key` and `verb` say what `x` must fit."""
        if x.is_nested:  # a padded batch in evaluation mode; few operations know those
            parts = [self._delta(module, parameters, part, key, verb) for part in x.unbind()]
            return torch.nested.as_nested_tensor(parts)
        down, up = parameters["down_weight"], parameters["up_weight"]
        size = parameters[key].shape[1 if key == "down_weight" else 0]
        # Counted from the front: the older exporter to ONNX writes axes as they are given, and ONNX
        # permutes by no negative ones.
        axis, end = self._checked_axis(module, x, size, verb) % x.ndim, x.ndim - 1
        last = x if axis == end else x.movedim(axis, end)
        hidden = F.linear(last.to(down.dtype), down, parameters["down_bias"])
        hidden = ACTIVATIONS[self.activation](hidden)
        # Zero times infinity is not zero: let the rest of what is not finite alone. Only that: what
        # the bottleneck itself makes infinite must show.
        finite = last.detach().sum(-1, keepdim=True, dtype=hidden.dtype).isfinite()
        hidden = torch.where(finite, hidden, 0)
        hidden = F.dropout(hidden, self.dropout, module.training)
        delta = F.linear(hidden, up, parameters["up_bias"])
        return delta if axis == end else delta.movedim(end, axis)

    def _checked_axis(self, module: nn.Module, x: Tensor, size: int, verb: str) -> int:
        axis = self.axis
        assert axis is not None
        if x.is_floating_point() and -x.ndim <= axis < x.ndim and x.shape[axis] == size:
            return axis
        raise AdaptationError(
            f"{where(module, self.name)} {verb} {x.dtype} of shape {tuple(x.shape)}, its "
            f"bottleneck is for {size} features along axis {axis}: say dim= and axis= where it is "
            "made"
        )


def _changes_size(conv: Any) -> bool:
    """Whether a convolution gives another number of places than it takes."""
    if conv.padding == "same":
        return False
    padding = [0] * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
    extra = conv.output_padding if isinstance(conv, CONV_TRANSPOSE) else [0] * len(padding)
    rows = zip(conv.kernel_size, conv.stride, conv.dilation, padding, extra, strict=True)
    return any(s != 1 or 2 * p != d * (k - 1) + e for k, s, d, p, e in rows)
