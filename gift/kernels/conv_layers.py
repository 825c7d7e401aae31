"""Fast paths of convolutions, transposed ones among them."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.cost_model import Form, Plan, plan
from gift.kernels.depthwise import FEW
from gift.kernels.effective_conv import EffectiveConv
from gift.kernels.effective_linear import made_for
from gift.kernels.geometry import Geometry, Sizes
from gift.kernels.little import little_conv
from gift.kernels.low_rank_conv import LowRankConv
from gift.kernels.operands import dropped_inputs, is_open, only_beside, operands, tell
from gift.kernels.torch_state import autocasts
from gift.layers.table import CONVOLUTIONS, TRANSPOSED, forwards_of
from gift.private.torch.layers import (
    convolve,
    convolve_transposed,
    convolves_as,
    convolves_transposed_as,
    padding_around,
)
from gift.private.torch.tracing import is_exporting


def conv_forwards(path: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return entries for `Method.forwards`: convolutions that are not transposed."""
    return dict.fromkeys(forwards_of("conv1d", "conv2d", "conv3d"), path)


def conv_transpose_forwards(path: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return entries for `Method.forwards`: transposed convolutions."""
    names = forwards_of("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    return dict.fromkeys(names, path)


def conv(self: Any, input: Tensor) -> Tensor:
    """Compute a convolution in its cheapest form, or with the effective weight if none applies."""
    delta = self._gift_weights["weight"]
    method, parameters = delta.whole_delta_of(self)
    dropped = dropped_inputs(method, input, self.training)
    if is_usual(self):
        *factors, scale = method.scaled_low_rank(parameters)
        output = low_rank_conv(self, input, factors, dropped, method.form, scale)
        if output is not None:
            return output
    if dropped is None:
        return effective_conv(self, input)
    left, right = method.low_rank(parameters)
    kernel = delta.layout.to_weight(left @ right)
    output = convolve(self, input, self._gift_frozen("weight"), self.bias)
    return (output + _convolved(self, dropped.to(kernel.dtype), kernel)).to(output.dtype)


def conv_transpose(self: Any, input: Tensor, output_size: Any = None) -> Tensor:
    """Compute a transposed convolution as `conv` does."""
    delta = self._gift_weights["weight"]
    more = output_padding_of(self, input, output_size) if is_usual(self) else None
    if more is None:
        return type(self)._gift_plain.forward(self, input, output_size)
    method, parameters = delta.whole_delta_of(self)
    dropped = dropped_inputs(method, input, self.training)
    *factors, scale = method.scaled_low_rank(parameters)
    output = low_rank_conv(self, input, factors, dropped, method.form, scale, more)
    if output is not None:
        return output
    if dropped is None:
        return effective_conv_transpose(self, input, output_size)
    left, right = method.low_rank(parameters)
    kernel = delta.layout.to_weight(left @ right)
    output = convolve_transposed(self, input, self._gift_frozen("weight"), self.bias, more)
    side = convolve_transposed(self, dropped.to(kernel.dtype), kernel, None, more)
    return (output + side).to(output.dtype)


def effective_conv(self: Any, input: Tensor) -> Tensor:
    """Convolve with the effective weight, of which nothing is kept where that is possible."""
    output = _effective(self, input) if is_usual(self) else None
    return convolve(self, input, self.weight, self.bias) if output is None else output


def effective_conv_transpose(self: Any, input: Tensor, output_size: Any = None) -> Tensor:
    """Compute a transposed convolution as `effective_conv` does."""
    more = output_padding_of(self, input, output_size) if is_usual(self) else None
    output = None if more is None else _effective(self, input, more)
    if output is None:
        output = type(self)._gift_plain.forward(self, input, output_size)
    return output


def effective_conv_forwards() -> dict[str, Callable[..., Any]]:
    """Return forward functions for methods that have none of their own: see `Method.forwards`."""
    return conv_forwards(effective_conv) | conv_transpose_forwards(effective_conv_transpose)


def _effective(layer: Any, input: Tensor, more: Sizes | None = None) -> Tensor | None:
    """Convolve with the effective weight; None if no fast path applies."""
    wide = layer.groups > 1 and math.prod(layer.kernel_size) > FEW
    made = made_for(layer, input, also_small=wide)
    if made is None:
        return None
    alike = operands(input, made.value, layer.bias)
    call = None if alike is None else _call_of(layer, alike[0], None, more)
    if alike is None or call is None:
        return None
    _, weight, bias = alike
    ways = layer._gift_weights["weight"].ways
    y: Tensor = EffectiveConv.apply(
        call.x, made.graph, weight, bias, made.again, ways, call.geometry
    )
    return y[0] if call.single else y


def _convolved(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve with a weight that is trained, and no bias."""
    usual = is_usual(layer) and operands(x, kernel.detach()) is not None
    call = _call_of(layer, x, None, None) if usual and x.dtype == kernel.dtype else None
    if call is None or torch.compiler.is_compiling() or autocasts(x.device.type):
        return convolve(layer, x, kernel, None)
    y: Tensor = EffectiveConv.apply(
        call.x, kernel, kernel.detach(), None, None, None, call.geometry
    )
    return y[0] if call.single else y


def low_rank_conv(
    layer: Any,
    input: Tensor,
    factors: Sequence[Tensor],
    dropped: Tensor | None,
    form: Form | None,
    scale: float = 1,
    more: Sizes | None = None,
) -> Tensor | None:
    """Apply a convolution with ``W0 + s left right``; None if no fast path applies.

    Args:
        layer: the layer that holds the frozen weight, for which `is_usual` is True.
        input: input with or without a batch axis.
        factors: factors of a delta whose rows are pieces of the weight's rows, in order.
        dropped: the delta's input, if it is not `input`.
        form: see `gift.kernels.cost_model`; None chooses the cheapest.
        scale: `s`.
        more: the output padding of a transposed convolution, None for others.
    """
    weight, rows = layer._gift_frozen("weight"), factors[0]
    if rows.dim() != (2 if layer.groups == 1 else 3):
        return None
    alike = operands(input, weight, layer.bias, *factors, dropped)
    call = None if alike is None else _call_of(layer, alike[0], alike[-1], more)
    if alike is None or call is None:
        return None
    _, weight, bias, left, right, _ = alike
    geometry, beside = call.geometry, only_beside(call.x, dropped)
    if form is None and dropped is None:
        little = little_conv(layer, call.x, weight, bias, left, right, scale, geometry)
        if little is not None:
            return little[0] if call.single else little
    chosen = (_plan if call.compiling else _planned)(
        geometry,
        call.x.shape,
        right.shape[-2],
        left.shape[-2] * layer.groups // geometry.shape[0],
        torch.is_grad_enabled(),
        "side" if beside and layer.groups == 1 else form,
        call.x.device.type == "cpu" and not is_exporting(),
    )
    if beside and chosen.form != "side":  # filters take longer than another weight does
        return None
    tell(layer, chosen.form)
    y: Tensor = LowRankConv.apply(
        call.x,
        weight,
        bias,
        left,
        right,
        scale,
        call.dropped,
        geometry,
        chosen,
        layer._gift_weights["weight"].ways,
    )
    return y[0] if call.single else y


class _Call(NamedTuple):
    """A call of a layer: what it convolves, and how.

    Args:
        x: the input, padded and with a batch axis.
        dropped: the same of the delta's input, or None.
        geometry: the convolution.
        single: whether the input had no batch axis.
        compiling: whether sizes may be symbolic.
    """

    x: Tensor
    dropped: Tensor | None
    geometry: Geometry
    single: bool
    compiling: bool


def _call_of(layer: Any, x: Tensor, dropped: Tensor | None, more: Sizes | None) -> _Call | None:
    """Return a call for an input in the dtype of the layer; None if it has another number of axes.

    Args:
        layer: the layer, for which `is_usual` is True.
        x: the input.
        dropped: the delta's input, if it is another one.
        more: as in `low_rank_conv`.
    """
    shape = layer._gift_frozen("weight").shape
    axes = len(shape) - 2
    if x.dim() not in (axes + 1, axes + 2):
        return None
    single = x.dim() == axes + 1
    if single:
        x, dropped = x[None], dropped if dropped is None else dropped[None]
    around = None
    if layer.padding_mode != "zeros":
        around = padding_around(layer)
    compiling = torch.compiler.is_compiling() or is_open(x)
    geometry, pads = (_settle if compiling else _settled)(
        shape,
        _hashable(layer.stride),
        _hashable(layer.padding),
        _hashable(layer.dilation),
        around,
        layer.groups,
        more,
    )
    if pads is not None:
        mode, dtype = "constant" if around is None else layer.padding_mode, x.dtype
        x = F.pad(x, pads, mode).to(dtype)  # under autocast some padding modes return 32 bits
        dropped = dropped if dropped is None else F.pad(dropped, pads, mode).to(dtype)
    return _Call(x, dropped, geometry, single, compiling)


def _settle(
    shape: Sizes,
    stride: Any,
    padding: Any,
    dilation: Any,
    around: Sizes | None,
    groups: int,
    more: Sizes | None,
) -> tuple[Geometry, Sizes | None]:
    """Return the convolution, and the padding added to its input.

    `shape` is that of the weight. Where the layer pads its input explicitly by `around`, that
    replaces its `padding`. `more` is the output padding of a transposed convolution.
    """
    axes = len(shape) - 2
    stride, dilation = _for_each(axes, stride), _for_each(axes, dilation)
    zeros, pads = (
        _padding(tuple(shape[2:]), padding, dilation) if around is None else (None, around)
    )
    zeros = zeros or (0,) * axes
    if more is None:
        return Geometry(tuple(shape), stride, zeros, dilation, groups), pads
    inputs, outputs, *kernel = shape
    turned = (outputs * groups, inputs // groups, *kernel)
    more = more if any(more) else ()
    return Geometry(turned, stride, zeros, dilation, groups, True, more), pads


_settled = lru_cache(maxsize=4096)(_settle)


def _plan(
    geometry: Geometry,
    sizes: Sizes,
    rank: int,
    cuts: int,
    trained: bool,
    form: Form | None,
    on_processor: bool,
) -> Plan:
    """Return the plan for a batch of these sizes; the other arguments are those of `plan`."""
    images, _, *inputs = sizes
    positions = images * math.prod(geometry.positions(tuple(inputs)))
    return plan(
        geometry,
        rank,
        cuts,
        positions,
        images=images,
        swept=images * math.prod(inputs) if geometry.transposed else None,
        trained=trained,
        form=form,
        on_processor=on_processor,
    )


_planned = lru_cache(maxsize=4096)(_plan)


def output_padding_of(layer: Any, input: Tensor, output_size: Any) -> Sizes | None:
    """Return the output padding of a transposed convolution; None if the layer must say what to do.

    Args:
        layer: the layer.
        input: its input.
        output_size: the size that the caller asks for, or None.
    """
    axes = len(layer.kernel_size)
    if layer.padding_mode != "zeros" or input.dim() not in (axes + 1, axes + 2):
        return None
    if output_size is None:
        return _for_each(axes, layer.output_padding)
    if len(output_size) not in (axes, input.dim()):
        return None
    settings = [_for_each(axes, given) for given in (layer.stride, layer.padding, layer.dilation)]
    sizes = zip(input.shape[-axes:], output_size[-axes:], layer.kernel_size, *settings, strict=True)
    more = tuple(m - (n - 1) * s + 2 * p - d * (k - 1) - 1 for n, m, k, s, p, d in sizes)
    return more if all(0 <= m < s for m, s in zip(more, settings[0], strict=True)) else None


def is_usual(layer: Any) -> bool:
    """Whether an adapted convolution computes as torch's does, with its weight in its own layout.

    A subclass or the instance itself may override the computation; a lazy layer has no shape yet.
    """
    delta = layer._gift_weights["weight"]
    if delta.layout is None or not delta.reads_alike:
        return False
    return convolves_as(layer, CONVOLUTIONS) or convolves_transposed_as(layer, TRANSPOSED)


def _padding(kernel: Sizes, padding: Any, dilation: Sizes) -> tuple[Sizes | None, Sizes | None]:
    """Return the zero padding of each axis, or the padding to add to the input explicitly."""
    if padding == "valid":
        return None, None
    if padding != "same":
        return _for_each(len(kernel), padding), None
    # Computed from the layer's current attributes: its own list dates from when it was made.
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals), None
    sides = [(total // 2, total - total // 2) for total in reversed(totals)]
    return None, tuple(side for both in sides for side in both)


def _for_each(axes: int, given: Any) -> Sizes:
    """Expand an argument of torch's functions, a number or a list, to one number for each axis."""
    sizes = (given,) if isinstance(given, int) else tuple(given)
    return sizes * axes if len(sizes) == 1 else sizes


def _hashable(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given
