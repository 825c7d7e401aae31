"""Fast paths for methods whose delta is a product of two factors."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.fast.choice import Form, cached_plan, linear_form, plan
from gift.fast.geometry import Geometry, Sizes
from gift.fast.linear import Product, linear_forwards
from gift.fast.low_rank_conv import LowRankConv
from gift.fast.low_rank_linear import LowRankLinear, outputs
from gift.fast.products import scaled
from gift.fast.transforms import is_transformed
from gift.methods.base import dotted

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

WATCHING: list[Callable[[nn.Module, Form], None]] = []
"""Called with each layer and what was chosen for it: see `gift.utils.info.forms`."""


def low_rank_forwards() -> dict[str, Callable[..., Any]]:
    """Entries for `Method.forwards`, for methods with `Method.low_rank`."""
    return linear_forwards(linear) | {dotted(layer.forward): conv for layer in CONVOLUTIONS}


def low_rank_product(
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    dropped: Tensor | None = None,
    scale: float = 1,
    form: Form | None = None,
) -> Tensor:
    """``W0 x + bias + s left right x``, in the dtype of the product.

    Args:
        x: ``(..., columns)``.
        product: with the frozen matrix.
        bias: of the layer, or None.
        factors: `left` and `right`.
        dropped: what the factors see in place of `x`.
        scale: `s`.
        form: see `gift.fast.choice`; None chooses.
    """
    left, right = factors
    if type(product) is Product and (alike := operands(x, product.matrix, bias, *factors, dropped)):
        x, weight, bias, left, right, dropped = alike
        trained = torch.is_grad_enabled()
        if form is None and x.device.type != "cpu":
            form = "side"
        chosen = linear_form(
            tuple(weight.shape),
            len(right),
            x.numel() // max(1, x.shape[-1]),
            trained=trained,
            form="side" if _only_beside(x, dropped) else form,
        )
        for told in WATCHING:
            told(product.layer, chosen)
        if not trained:  # what autograd would add takes longer than small layers
            return outputs(x, weight, bias, left, right, scale, dropped, chosen)[0]
        output: Tensor = LowRankLinear.apply(x, weight, bias, left, right, scale, dropped, chosen)
        return output
    output = product(x, bias)
    hidden = F.linear((x if dropped is None else dropped).to(right.dtype), right)
    return (output + F.linear(hidden, scaled(left, scale))).to(output.dtype)


def operands(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[Any] | None:
    """All of them in the dtype in which a layer computes; None where there is no fast path.

    The fast paths' functions are neither for transforms nor for traces of TorchScript, and give no
    gradient of the weight. A weight of 16 bits has factors of 32, which are rounded like all that
    it meets.
    """
    given = [x, weight, *others]
    if weight.requires_grad or not weight.is_floating_point() or x.dim() == 0:
        return None
    if is_transformed():
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif x.dtype != weight.dtype:
        return None
    else:
        dtype = weight.dtype
        wider = (t.dtype.itemsize > dtype.itemsize for t in others if t is not None)
        if dtype.itemsize >= 4 and any(wider):
            return None
    alike = all(tensor is None or tensor.dtype == dtype for tensor in given)
    return given if alike else [None if t is None else t.to(dtype) for t in given]


def linear(
    method: Any,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """The product and the factors', which see inputs dropped while training."""
    dropped = F.dropout(x, method.dropout) if method.dropout and training else None
    *factors, scale = method.scaled_low_rank(parameters)
    return low_rank_product(x, product, bias, factors, dropped, scale, method.form)


def _only_beside(x: Tensor, dropped: Tensor | None) -> bool:
    """Whether the delta must go beside the frozen weight.

    What is rounded to 16 bits at the size of the weight would lose small deltas; and what is
    exported is for all sizes.
    """
    return dropped is not None or x.dtype.itemsize < 4 or torch.compiler.is_exporting()


def conv(self: Any, input: Tensor) -> Tensor:
    """The convolution in the cheapest form; the general way where there is no fast one."""
    adapter = self._gift_adapters["weight"]
    method, parameters = adapter.delta_of(self)
    dropped = F.dropout(input, method.dropout) if method.dropout and self.training else None
    if is_usual(self) and self.groups == 1:
        *factors, scale = method.scaled_low_rank(parameters)
        output = low_rank_conv(self, input, factors, dropped, method.form, scale)
        if output is not None:
            return output
    if dropped is None:
        return self._conv_forward(input, self.weight, self.bias)
    left, right = method.low_rank(parameters)
    delta = adapter.layout.to_weight(left @ right)
    output = self._conv_forward(input, self._gift_frozen("weight"), self.bias)
    return (output + self._conv_forward(dropped.to(delta.dtype), delta, None)).to(output.dtype)


def low_rank_conv(
    layer: Any,
    input: Tensor,
    factors: Sequence[Tensor],
    dropped: Tensor | None,
    form: Form | None,
    scale: float = 1,
) -> Tensor | None:
    """What a convolution of one group gives with ``W0 + s left right``; None where that is barred.

    Args:
        layer: that holds the frozen weight, and `is_usual`.
        input: with or without a batch.
        factors: of a delta whose rows are pieces of the weight's rows, in order.
        dropped: what the delta sees in place of the input.
        form: see `gift.fast.choice`; None chooses.
        scale: `s`.
    """
    weight = layer._gift_frozen("weight")
    axes = weight.dim() - 2
    if input.dim() not in (axes + 1, axes + 2):
        return None
    padding, pads = _padding(layer)
    x = _as_batch(input, axes, pads, layer.padding_mode)
    if dropped is not None:
        dropped = _as_batch(dropped, axes, pads, layer.padding_mode)
    alike = operands(x, weight, layer.bias, *factors, dropped)
    if alike is None:
        return None
    (outputs, *_), (left, right) = weight.shape, factors
    stride, dilation = (_for_each(axes, given) for given in (layer.stride, layer.dilation))
    geometry = Geometry(tuple(weight.shape), stride, padding, dilation)
    positions = x.shape[0] * math.prod(geometry.positions(tuple(x.shape[2:])))
    known = type(positions) is int and not torch.compiler.is_compiling()
    chosen = (cached_plan if known else plan)(
        geometry,
        len(right),
        len(left) // outputs,
        positions,
        pictures=x.shape[0],
        trained=torch.is_grad_enabled(),
        form="side" if _only_beside(alike[0], dropped) else form,
        on_processor=x.device.type == "cpu" and not torch.compiler.is_exporting(),
    )
    for told in WATCHING:
        told(layer, chosen.form)
    *alike, dropped = alike
    y: Tensor = LowRankConv.apply(*alike, scale, dropped, geometry, chosen)
    return y if input.dim() == axes + 2 else y[0]


def is_usual(layer: Any) -> bool:
    """Whether an adapted convolution computes as torch's, with a weight that it reads as its own.

    A subclass may compute something else, or the instance itself; a lazy one has no shape yet.
    """
    adapter = layer._gift_adapters["weight"]
    if adapter.layout is None or not adapter.reads_alike:
        return False
    if "_conv_forward" in vars(layer):  # as recipes for tileable pictures set it
        return False
    return any(type(layer)._conv_forward is cls._conv_forward for cls in CONVOLUTIONS)


def _padding(layer: Any) -> tuple[Sizes, list[int] | None]:
    """The zeros on both sides of each axis, and what is to be put around the input before."""
    kernel = layer._gift_frozen("weight").shape[2:]
    none = (0,) * len(kernel)
    if layer.padding_mode != "zeros":
        return none, layer._reversed_padding_repeated_twice
    if layer.padding == "valid":
        return none, None
    if layer.padding != "same":
        return _for_each(len(kernel), layer.padding), None
    # From what the layer is now: its own list is of when it was made.
    dilation = _for_each(len(kernel), layer.dilation)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals), None
    return none, [side for total in reversed(totals) for side in (total // 2, total - total // 2)]


def _for_each(axes: int, given: Any) -> Sizes:
    """One number for each axis, of what torch's functions take: one for all, or a list."""
    sizes = (given,) if isinstance(given, int) else tuple(given)
    return sizes * axes if len(sizes) == 1 else sizes


def _as_batch(x: Tensor, axes: int, pads: list[int] | None, mode: str) -> Tensor:
    """With a batch, and with the padding that the convolution itself does not do."""
    x = x if x.dim() == axes + 2 else x[None]
    return x if pads is None else F.pad(x, pads, "constant" if mode == "zeros" else mode)
