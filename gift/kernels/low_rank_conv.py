"""A convolution with a low-rank delta, without a gradient of the weight's size."""

import math
from typing import Any

import torch
from torch import Tensor

from gift.kernels.conv_as_gemm import Filters, add_product
from gift.kernels.cost_model import Plan
from gift.kernels.geometry import Geometry
from gift.kernels.products import effective, outer, product, scaled
from gift.kernels.recomputed import THIN, Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast
from gift.private.torch.tracing import is_batched


class LowRankConv(torch.autograd.Function):
    """``conv(x, W + s left right) + bias``, optionally with another input for the delta.

    For the backward pass it saves the inputs, which the preceding layers usually save anyway, or
    what they are computed from (see `gift.kernels.recomputed`), and the outputs of the filters only
    if they are few. The backward pass is differentiable.

    Args (of `apply`):
        x: ``(batch, in, *positions)``.
        weight: frozen, ``(out, in, *kernel)``.
        bias: or None.
        left, right: the factors; each output has as many rows of `left` as any other.
        scale: `s`.
        dropped: the delta's input in place of `x`, for the form "side"; or None.
        geometry, plan: the convolution, and how to compute it.
        ways: what is known of the inputs of the layer, see `keep`.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        scale: float,
        dropped: Tensor | None,
        geometry: Geometry,
        plan: Plan,
        ways: Ways | None = None,
    ) -> Tensor:
        ctx.rest = scale, geometry, plan
        hidden = None
        if plan.form == "side":
            y = geometry.apply(x, weight, bias)
            filters = filters_of(weight, left, right, geometry, plan)
            hidden = filters(x if dropped is None else dropped)
            add_product(y, left.reshape(len(weight), -1), hidden, scale)
            if math.prod(hidden.shape[1:]) * THIN > math.prod(x.shape[1:]):
                hidden = None
        else:
            y = geometry.apply(x, effective(weight, left, right, scale), bias)
        ctx.drops = dropped is not None
        seen = x if dropped is None else dropped
        ctx.kept, tensors = keep(seen, len(weight) * geometry.taps, ways)
        ctx.save_for_backward(weight, left, right, hidden, *tensors)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        weight, left, right, hidden, *tensors = ctx.saved_tensors
        seen = ctx.kept.value(tensors)  # as the layer's input it only gives the shape, if it drops
        scale, geometry, plan = ctx.rest
        of_x, _, of_bias, of_left, of_right, _, of_dropped, *_ = ctx.needs_input_grad
        gx = gb = gl = gr = gd = None
        form = "whole" if not ctx.drops and is_batched(g) else plan.form
        side = form == "side"
        if of_bias:
            gb = g.sum((0, *range(2, g.dim())))
        # If the input needs no gradient, the values of the weight do not matter.
        used = weight if side or not of_x else effective(weight, left, right, scale)
        if form == "whole":
            gx, whole = geometry.gradients(g, seen, used, of_x)
            whole = whole.reshape(len(left), -1)
            gl = scaled(whole @ right.mT, scale) if of_left else None
            gr = scaled(left.mT @ whole, scale) if of_right else None
            return gx, None, gb, gl, gr, *[None] * 5
        if of_x:
            gx = geometry.gradient_of_input(g, seen, used)
        filters, flat = filters_of(weight, left, right, geometry, plan), g.flatten(2)
        if of_left:
            if hidden is None or torch.is_grad_enabled():  # the saved tensor has no graph
                hidden = filters(seen)
            gl = scaled(outer(hidden.flatten(2), flat).mT.contiguous(), scale).view(left.shape)
        target = gx if not ctx.drops else torch.zeros_like(seen) if of_dropped else None
        if of_right or (side and target is not None):
            rows = scaled(left.reshape(len(weight), -1).mT.contiguous(), scale)
            gh = product(rows, flat).unflatten(2, g.shape[2:])
            prepared = filters.prepared(gh, seen)
            gr = filters.gradient(prepared, seen) if of_right else None
            if side and target is not None:
                filters.add_input_gradient(target, prepared, seen)
        gd = target if of_dropped else None
        return gx, None, gb, gl, gr, None, gd, *[None] * 3


def filters_of(
    weight: Tensor, left: Tensor, right: Tensor, geometry: Geometry, plan: Plan
) -> Filters:
    """Return the filters of the delta."""
    return Filters(right, len(left) // len(weight), geometry, plan.as_product)
