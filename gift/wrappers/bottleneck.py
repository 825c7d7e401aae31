"""Bottleneck adapters: a small network beside or after a module, added to its output."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.forwards import Forward, ForwardMethod, where
from gift.errors import AdaptationError
from gift.layers.table import Features
from gift.methods.settings import choice, flag, is_integer, number, probability, setting, whole
from gift.private.torch.layers import CONV, CONV_TRANSPOSE
from gift.wrappers.arguments import in_order
from gift.wrappers.features import features_of, weight_beside
from gift.wrappers.tensors import first_tensor, with_first_changed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Bottleneck(ForwardMethod):
    """Bottleneck adapter after any module ``f``, or beside it.

    Sequential (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) and parallel (He et al. 2022,
    https://arxiv.org/abs/2110.04366), where ``z`` is the module's output or its input::

        h' = f(x) + s * (W_up act(W_down z + b_down) + b_up),    z = f(x)  or  z = x

    It adds ``down_weight (size, d_z)``, ``down_bias (size)``, ``up_weight (d, size)`` and ``up_bias
    (d)``, which are ``size * (d_z + d + 1) + d`` parameters. `W_up` and both biases start at zero,
    so that the module's output is bit-identical until the first step.

    The output may be a tensor, or a tuple, list, mapping or dataclass, whose first tensor is
    changed. Activations that are not finite pass unchanged.

    The adapter only runs if the module is called. It has no effect if the parent reads the module's
    weight instead, as a fused kernel does.

    Args:
        size: width of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        scaling: the factor `s`; the paper on the parallel form uses 4.
        parallel: whether the bottleneck reads the module's input, its first tensor, instead of its
            output.
        dropout: probability of dropout on the bottleneck, in training mode.
        dim: number of features; None infers it: outputs from the last layer in registration order,
            inputs from the first one.
        axis: the axis of the features; None infers it from the same layers: the last axis, except
            for the channels of convolutions and of batch, group and instance norms.
        dtype: dtype of the new parameters, or its name; None means that of the module, but at least
            float32. The result is rounded once, to the dtype of the output.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
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
        """Return the method with the axis of the module's features."""
        features = self._features(module)
        if self.parallel and isinstance(module, CONV) and _changes_size(module):
            raise AdaptationError(
                "its input and output differ in more than their channels (stride, padding): a "
                "parallel bottleneck cannot be added, a sequential one can"
            )
        return replace(self, axis=features.axis)

    def _features(self, module: nn.Module) -> Features:
        features = features_of(module, self.dim, self.axis)
        if self.parallel and features.inputs is None:
            raise AdaptationError(
                "its input features are not known, as those of an embedding: a parallel bottleneck "
                "needs them (a sequential one would work, or dim= if it has as many inputs as "
                "outputs)"
            )
        return features

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return a Kaiming-uniform `W_down` as in ``nn.Linear``; the others are zero."""
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
        """Compute ``h'``."""
        beside = None
        if self.parallel:  # before the module, which may modify its input in place
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
            raise AdaptationError(f"{where(module, self.name)} returns no tensor to change")
        return changed

    def _added(self, module: nn.Module, output: Tensor, delta: Tensor) -> Tensor:
        if output.is_nested and delta.is_nested:
            pairs = zip(output.unbind(), delta.unbind(), strict=True)
            return torch.nested.as_nested_tensor([self._added(module, *pair) for pair in pairs])
        if delta.shape != output.shape:
            raise AdaptationError(
                f"{where(module, self.name)} gives {tuple(output.shape)}, the bottleneck beside it "
                f"{tuple(delta.shape)}: use a sequential one (parallel=False)"
            )
        # Subtract instead of adding: f(x) + 0.0 changes an f(x) of -0.0, f(x) - 0.0 does not.
        return (output - (0.0 - self.scaling * delta)).to(output.dtype)

    def _delta(
        self, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, key: str, verb: str
    ) -> Tensor:  # fmt: skip
        """Compute ``W_up act(W_down x + b_down) + b_up``; `key` and `verb` serve to check `x`."""
        if x.is_nested:  # a padded batch in evaluation mode; few operations support nested tensors
            parts = [self._delta(module, parameters, part, key, verb) for part in x.unbind()]
            return torch.nested.as_nested_tensor(parts)
        down, up = parameters["down_weight"], parameters["up_weight"]
        size = parameters[key].shape[1 if key == "down_weight" else 0]
        # Count from the front: the older ONNX exporter writes axes as they are given, and ONNX does
        # not permute by negative axes.
        axis, end = self._checked_axis(module, x, size, verb) % x.ndim, x.ndim - 1
        last = x if axis == end else x.movedim(axis, end)
        hidden = F.linear(last.to(down.dtype), down, parameters["down_bias"])
        hidden = ACTIVATIONS[self.activation](hidden)
        # Zero times infinity is not zero: zero the hidden features of inputs that are not finite,
        # so that these pass. Only those: infinities that the bottleneck itself produces must show.
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
            f"bottleneck is for {size} features along axis {axis}: give dim= and axis= where it is "
            "made"
        )


def _changes_size(conv: Any) -> bool:
    """Whether a convolution's output has another spatial size than its input."""
    if conv.padding == "same":
        return False
    padding = [0] * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
    extra = conv.output_padding if isinstance(conv, CONV_TRANSPOSE) else [0] * len(padding)
    rows = zip(conv.kernel_size, conv.stride, conv.dilation, padding, extra, strict=True)
    return any(s != 1 or 2 * p != d * (k - 1) + e for k, s, d, p, e in rows)
