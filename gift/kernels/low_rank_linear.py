"""A linear layer with a low-rank delta, as matrix products that are fast for few rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.cost_model import Form
from gift.kernels.onednn import matmul
from gift.kernels.products import effective, for_each, outer, product, scaled
from gift.kernels.recomputed import Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast
from gift.private.torch.tracing import is_known

MANY = 1024  # number of rows from which they are computed in parts


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
            hidden = product(right, _columns(seen))
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
        flat = g.reshape(-1, g.shape[-1])
        side = form == "side"
        if of_bias:
            gb = flat.sum(0)
        if of_x:
            used = weight if side else effective(weight, left, right, scale)
            gx = matmul(flat, used).view(shape)
        if form == "whole" and of_right:
            whole = flat.mT @ seen.reshape(-1, seen.shape[-1])
            gl = scaled(whole @ right.mT, scale) if of_left else None
            gr = scaled(left.mT @ whole, scale)
            return gx, None, gb, gl, gr, *[None] * 4
        columns = _columns(g)
        if of_left:
            hidden = _hidden(hidden, right, seen, columns)
            gl = scaled(outer(hidden, columns).mT.contiguous(), scale)
        if of_right or side:
            gh = product(scaled(left.mT.contiguous(), scale), columns)
        if of_right:
            gr = outer(gh, _columns(seen))
        if side and of_dropped:
            gd = gh.mT @ right if gh.dim() == 2 else torch.bmm(gh.mT, for_each(right, gh))
            gd = gd.view(shape)
        if side and gx is not None and not drops:
            _add_product(gx, right.mT, gh)
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
    hidden = product(right, _columns(x if dropped is None else dropped))
    _add_product(y, left, hidden, scale)
    return y, hidden


def _add_product(y: Tensor, matrix: Tensor, few: Tensor, scale: float = 1) -> None:
    """Add ``scale matrix few`` to the columns of `y`, which is contiguous, in place."""
    if few.dim() == 2:
        # Not `y.mT.addmm_(matrix, few)`: torch 2.14 compiles that to something else.
        y.view(-1, y.shape[-1]).addmm_(few.mT, matrix.mT, alpha=scale)
    else:
        parts = y.view(few.shape[0], -1, y.shape[-1])
        parts.baddbmm_(few.mT, for_each(matrix.mT, few), alpha=scale)


def _columns(x: Tensor) -> Tensor:
    """View `x` as ``(features, rows)``, or in parts; there is no copy if `x` is contiguous."""
    features = x.shape[-1]
    rows = x.numel() // max(1, features)
    parts = 1
    if x.device.type == "cpu" and is_known(rows >= MANY):
        parts = next(n for n in (8, 4, 2, 1) if is_known(rows % n == 0))
    if parts == 1:
        return x.reshape(rows, features).mT
    return x.reshape(parts, rows // parts, features).mT


def _hidden(kept: Tensor | None, right: Tensor, x: Tensor | None, like: Tensor) -> Tensor:
    """Return the saved ``right x``; recompute it if it was not saved or its graph is needed."""
    if kept is None or torch.is_grad_enabled():
        if x is None:
            raise RuntimeError(
                "a delta whose first factor is frozen (lora_fa, vera) keeps no inputs, so that "
                "its gradient has none: train both factors, or differentiate by torch.func"
            )
        return product(right, _columns(x))
    if kept.dim() > like.dim():  # saved in parts, and compiled since
        return kept.movedim(0, 1).flatten(1)
    return kept
