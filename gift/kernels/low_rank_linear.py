"""A linear layer with a low-rank delta, as matrix products that are fast for few rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels import thin
from gift.kernels.cost_model import Form
from gift.kernels.onednn import matmul
from gift.kernels.products import effective, rows_of, scaled
from gift.kernels.recomputed import Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast


class LowRankLinear(torch.autograd.Function):
    """``W x + bias + s left right x``, where `dropped` replaces the second `x` if it is given.

    For the backward pass it saves the inputs as they are given, or what they are computed from (see
    `gift.kernels.recomputed`), and in the form "side" ``right x``. If `right` is frozen it saves
    ``right x`` alone. The backward pass is differentiable.

    Args (of `apply`):
        x: ``(..., in)``.
        weight: frozen, ``(out, in)``.
        bias: or None.
        left, right: the factors ``(out, rank)`` and ``(rank, in)``.
        scale: `s`.
        dropped: the delta's input in place of `x`, for the form "side"; or None.
        form: how to compute it, see `gift.kernels.cost_model`.
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
        form: Form,
        ways: Ways | None = None,
    ) -> Tensor:
        of_left, of_right = ctx.needs_input_grad[3:5]
        seen = x if dropped is None else dropped
        y, hidden = outputs(x, weight, bias, left, right, scale, dropped, form)
        if hidden is None and of_left and not of_right:
            hidden = thin.times(right, seen)
        ctx.rest = x.shape, scale, dropped is not None, form
        ctx.kept, tensors = keep(seen, len(weight), ways) if of_right else (None, ())
        ctx.save_for_backward(weight, left, right, hidden if of_left else None, *tensors)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        weight, left, right, hidden, *tensors = ctx.saved_tensors
        seen: Any = None if ctx.kept is None else ctx.kept.value(tensors)
        shape, scale, drops, form = ctx.rest
        of_x, _, of_bias, of_left, of_right, _, of_dropped, *_ = ctx.needs_input_grad
        gx = gb = gl = gr = gd = None
        g = g.contiguous()  # attention returns a non-contiguous one, which each use would copy
        flat = rows_of(g)
        side = form == "side"
        if of_bias:
            gb = flat.sum(0)
        if of_x:
            used = weight if side else effective(weight, left, right, scale)
            gx = matmul(flat, used).view(shape)
        if form == "whole" and of_right:
            whole = flat.mT @ rows_of(seen)
            gl = scaled(whole @ right.mT, scale) if of_left else None
            gr = scaled(left.mT @ whole, scale)
            return gx, None, gb, gl, gr, *[None] * 4
        if of_left:
            gl = scaled(thin.of_left(_hidden(hidden, right, seen), g), scale)
        if of_right or side:
            gh = thin.back(scaled(left, scale), g)
        if of_right:
            gr = thin.of_right(gh, seen)
        if side and of_dropped:
            gd = (rows_of(gh) @ right).view(shape)
        if side and gx is not None and not drops:
            thin.add(gx, gh, right)
        return gx, None, gb, gl, gr, None, gd, None, None


def outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    scale: float,
    dropped: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    """Return the layer's output, and ``right x`` if it was computed on the way."""
    if form != "side":
        return F.linear(x, effective(weight, left, right, scale), bias), None
    y = F.linear(x, weight, bias)
    hidden = thin.times(right, x if dropped is None else dropped)
    thin.add(y, hidden, left.mT, scale)
    return y, hidden


def _hidden(kept: Tensor | None, right: Tensor, x: Tensor | None) -> Tensor:
    """Return the saved ``right x``; recompute it if it was not saved or its graph is needed."""
    if kept is None or torch.is_grad_enabled():
        if x is None:
            raise RuntimeError(
                "a delta whose first factor is frozen (lora_fa, vera) keeps no inputs, so that "
                "its gradient has none: train both factors, or differentiate by torch.func"
            )
        return thin.times(right, x)
    return kept
