"""A convolution with an effective weight, of which nothing is kept for the backward pass."""

from typing import Any

import torch
from torch import Tensor

from gift.kernels.effective_linear import Again
from gift.kernels.geometry import Geometry
from gift.kernels.recomputed import Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast


class EffectiveConv(torch.autograd.Function):
    """``conv(x, W') + bias``, which saves neither `x` nor ``W'`` where both can be computed again.

    The backward pass is differentiable.

    Args (of `apply`):
        x: ``(batch, in, *positions)``.
        graph: the node of ``W'`` in the graph, a tensor without memory; ``W'`` itself without
            `again`.
        value: the values of ``W'``, in the dtype of `x`.
        bias: or None.
        again: computes ``W'`` in the backward pass; None saves it.
        ways: what is known of the inputs of the layer, see `gift.kernels.recomputed.keep`.
        geometry: the convolution.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        x: Tensor,
        graph: Tensor,
        value: Tensor,
        bias: Tensor | None,
        again: Again | None,
        ways: Ways | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.again, ctx.geometry = again, geometry
        ctx.rest = x.dtype, graph.dtype
        work = geometry.shape[0] // geometry.groups * geometry.taps
        ctx.kept, tensors = keep(x, work, ways)
        ctx.save_for_backward(None if again is not None else graph, *tensors)
        return geometry.apply(x, value, bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        saved, *tensors = ctx.saved_tensors
        of_x, of_weight, _, of_bias, *_ = ctx.needs_input_grad
        dtype, of = ctx.rest
        seen = ctx.kept.value(tensors)
        weight = saved if ctx.again is None else ctx.again.weight().to(dtype)
        gx = gw = gb = None
        if of_weight:
            gx, gw = ctx.geometry.gradients(g, seen, weight, of_x)
            gw = gw.to(of)
        elif of_x:
            gx = ctx.geometry.gradient_of_input(g, seen, weight)
        if of_bias:
            gb = g.sum((0, *range(2, g.dim())))
        return gx, gw, None, gb, None, None, None
