"""Fast paths of convolutions whose delta is a product of two factors."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.cost_model import Form, Plan, plan
from gift.kernels.geometry import Geometry, Sizes
from gift.kernels.low_rank_conv import LowRankConv
from gift.kernels.operands import WATCHING, dropped_inputs, is_open, only_beside, operands
from gift.layers.table import CONVOLUTIONS, forwards_of
from gift.private.torch.layers import convolve, convolves_as, padding_around
from gift.private.torch.tracing import is_exporting


def conv_forwards(path: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return entries for `Method.forwards`: convolutions that are not transposed."""
    return dict.fromkeys(forwards_of("conv1d", "conv2d", "conv3d"), path)


def conv(self: Any, input: Tensor) -> Tensor:
    """Compute a convolution in its cheapest form, or with the effective weight if none applies."""
    try:
        delta = self._gift_weights["weight"]
    except AttributeError:  # a reference to this method outlived the adaptation
        return type(self).forward(self, input)
    method, parameters = delta.whole_delta_of(self)
    dropped = dropped_inputs(method, input, self.training)
    if is_usual(self) and self.groups == 1:
        *factors, scale = method.scaled_low_rank(parameters)
        output = low_rank_conv(self, input, factors, dropped, method.form, scale)
        if output is not None:
            return output
    if dropped is None:
        return convolve(self, input, self.weight, self.bias)
    left, right = method.low_rank(parameters)
    kernel = delta.layout.to_weight(left @ right)
    output = convolve(self, input, self._gift_frozen("weight"), self.bias)
    return (output + convolve(self, dropped.to(kernel.dtype), kernel, None)).to(output.dtype)


def low_rank_conv(
    layer: Any,
    input: Tensor,
    factors: Sequence[Tensor],
    dropped: Tensor | None,
    form: Form | None,
    scale: float = 1,
) -> Tensor | None:
    """Apply a convolution of one group with ``W0 + s left right``; None if no fast path applies.

    Args:
        layer: the layer that holds the frozen weight, for which `is_usual` is True.
        input: input with or without a batch axis.
        factors: factors of a delta whose rows are pieces of the weight's rows, in order.
        dropped: the delta's input, if it is not `input`.
        form: see `gift.kernels.cost_model`; None chooses the cheapest.
        scale: `s`.
    """
    weight = layer._gift_frozen("weight")
    axes = weight.dim() - 2
    if input.dim() not in (axes + 1, axes + 2):
        return None
    alike = operands(input, weight, layer.bias, *factors, dropped)
    if alike is None:
        return None
    x, weight, bias, left, right, dropped = alike
    single = x.dim() == axes + 1
    if single:
        x, dropped = x[None], dropped if dropped is None else dropped[None]
    around = None
    if layer.padding_mode != "zeros":
        around = padding_around(layer)
    compiling = torch.compiler.is_compiling() or is_open(x)
    geometry, pads, chosen = (_settle if compiling else _settled)(
        weight.shape,
        _hashable(layer.stride),
        _hashable(layer.padding),
        _hashable(layer.dilation),
        around,
        x.shape,
        right.shape[0],
        left.shape[0] // weight.shape[0],
        torch.is_grad_enabled(),
        "side" if only_beside(x, dropped) else form,
        x.device.type == "cpu" and not is_exporting(),
    )
    if pads is not None:
        mode, dtype = "constant" if around is None else layer.padding_mode, x.dtype
        x = F.pad(x, pads, mode).to(dtype)  # under autocast some padding modes return 32 bits
        dropped = dropped if dropped is None else F.pad(dropped, pads, mode).to(dtype)
    for watcher in WATCHING:
        watcher(layer, chosen.form)
    y: Tensor = LowRankConv.apply(
        x,
        weight,
        bias,
        left,
        right,
        scale,
        dropped,
        geometry,
        chosen,
        layer._gift_weights["weight"].ways,
    )
    return y[0] if single else y


def _settle(
    shape: Sizes,
    stride: Any,
    padding: Any,
    dilation: Any,
    around: Sizes | None,
    sizes: Sizes,
    rank: int,
    cuts: int,
    trained: bool,
    form: Form | None,
    on_processor: bool,
) -> tuple[Geometry, Sizes | None, Plan]:
    """Decide from sizes alone: the convolution, the padding added to its input, the plan.

    `shape` is that of the weight, `sizes` that of the batch. Where the layer pads its input
    explicitly by `around`, that replaces its `padding`. The other arguments are those of `plan`.
    """
    axes = len(shape) - 2
    stride, dilation = _for_each(axes, stride), _for_each(axes, dilation)
    zeros, pads = (
        _padding(tuple(shape[2:]), padding, dilation) if around is None else (None, around)
    )
    geometry = Geometry(tuple(shape), stride, zeros or (0,) * axes, dilation)
    images, _, *inputs = sizes
    if pads is not None:  # pads list the last axis first
        inputs = [n + pads[-2 * i - 2] + pads[-2 * i - 1] for i, n in enumerate(inputs)]
    positions = images * math.prod(geometry.positions(tuple(inputs)))
    chosen = plan(
        geometry,
        rank,
        cuts,
        positions,
        images=images,
        trained=trained,
        form=form,
        on_processor=on_processor,
    )
    return geometry, pads, chosen


_settled = lru_cache(maxsize=4096)(_settle)


def is_usual(layer: Any) -> bool:
    """Whether an adapted convolution computes as torch's does, with its weight in its own layout.

    A subclass or the instance itself may override the computation; a lazy layer has no shape yet.
    """
    delta = layer._gift_weights["weight"]
    if delta.layout is None or not delta.reads_alike:
        return False
    return convolves_as(layer, CONVOLUTIONS)


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
