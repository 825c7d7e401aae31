"""A convolution with a low-rank delta, without a gradient of the weight's size."""

import math
from collections.abc import Callable
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
        weight: frozen, ``(out, in, *kernel)``, or as the geometry says.
        bias: or None.
        left, right: the factors, or those of each group; each output has as many rows of `left` as
            any other.
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
        hidden, outputs = None, geometry.shape[0] // geometry.groups
        if plan.form == "side":
            y = geometry.apply(x, weight, bias)
            filters = filters_of(left, right, geometry, plan)
            hidden = filters(geometry.split_groups(x if dropped is None else dropped))
            rows, given = rows_of(left, geometry), hidden
            _by_group(y, geometry, lambda parts: add_product(parts, rows, given, scale))
            few = math.prod(hidden.shape[1:]) * geometry.groups
            if few * THIN > math.prod(x.shape[1:]):
                hidden = None
        else:
            y = geometry.apply(x, effective_of(weight, left, right, scale, geometry), bias)
        ctx.drops = dropped is not None
        seen = x if dropped is None else dropped
        ctx.kept, tensors = keep(seen, outputs * geometry.taps, ways)
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
        used = weight
        if of_x and not side:
            used = effective_of(weight, left, right, scale, geometry)
        if form == "whole":
            gx, whole = geometry.gradients(g, seen, used, of_x)
            whole = geometry.as_filters(whole).reshape(*left.shape[:-1], right.shape[-1])
            gl = scaled(whole @ right.mT, scale) if of_left else None
            gr = scaled(left.mT @ whole, scale) if of_right else None
            return gx, None, gb, gl, gr, *[None] * 5
        if of_x:
            gx = geometry.gradient_of_input(g, seen, used)
        filters, flat = filters_of(left, right, geometry, plan), geometry.split_groups(g).flatten(2)
        each = geometry.split_groups(seen)
        if of_left:
            if hidden is None or torch.is_grad_enabled():  # the saved tensor has no graph
                hidden = filters(each)
            found = outer(hidden.flatten(2), flat, geometry.groups)
            gl = scaled(found.mT.contiguous(), scale).view(left.shape)
        target = gx if not ctx.drops else torch.zeros_like(seen) if of_dropped else None
        if of_right or (side and target is not None):
            rows = scaled(rows_of(left, geometry).mT.contiguous(), scale)
            gh = product(rows, flat).unflatten(2, g.shape[2:])
            prepared = filters.prepared(gh, each)
            gr = filters.gradient(prepared, each) if of_right else None
            if side and target is not None:
                _by_group(
                    target,
                    geometry,
                    lambda parts: filters.add_input_gradient(parts, prepared, each),
                )
        gd = target if of_dropped else None
        return gx, None, gb, gl, gr, None, gd, *[None] * 3


def effective_of(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, geometry: Geometry
) -> Tensor:
    """Compute ``W + s left right``."""
    if geometry.groups == 1 and not geometry.transposed:
        return effective(weight, left, right, scale)
    return weight.add(geometry.as_weight(left @ right), alpha=scale)


def rows_of(left: Tensor, geometry: Geometry) -> Tensor:
    """Return ``(..., out, filters)``: what each output of a group takes of its filters."""
    return left.reshape(*left.shape[:-2], geometry.shape[0] // geometry.groups, -1)


def filters_of(left: Tensor, right: Tensor, geometry: Geometry, plan: Plan) -> Filters:
    """Return the filters of the delta."""
    cuts = left.shape[-2] * geometry.groups // geometry.shape[0]
    return Filters(right, cuts, geometry, plan.as_product)


def _by_group(x: Tensor, geometry: Geometry, write: Callable[[Tensor], None]) -> None:
    """Let a function write to the parts of an activation (see `Geometry.split_groups`)."""
    if geometry.groups == 1 or x.is_contiguous():
        write(geometry.split_groups(x))
        return
    parts = geometry.split_groups(x.contiguous())
    write(parts)
    x.copy_(geometry.merge_groups(parts))
