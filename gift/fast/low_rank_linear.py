"""A linear layer with a low-rank delta, in the products that are fast for few rows."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.fast.thin import outer, product, scaled


class LowRankLinear(torch.autograd.Function):
    """``W x + bias + s left right x``, or with ``dropped`` for the second `x`.

    For the backward pass it keeps the inputs as they are given; if `right` is frozen, ``right x``
    instead. Gradients are made of operations with gradients of their own.

    Args (of `apply`):
        x: ``(..., in)``.
        weight: frozen, ``(out, in)``.
        bias: or None.
        left, right: the factors ``(out, rank)`` and ``(rank, in)``.
        scale: `s`.
        dropped: what the delta sees in place of `x`; or None.
    """

    @staticmethod
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        seen = x if dropped is None else dropped
        y, hidden = outputs(x, seen, weight, bias, left, right, scale)
        ctx.shape, ctx.scale, ctx.drops = x.shape, scale, dropped is not None
        of_left, of_right = ctx.needs_input_grad[3:5]
        kept = seen if of_right else hidden if of_left else None
        ctx.save_for_backward(weight, left, right, kept)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        weight, left, right, kept = ctx.saved_tensors
        of_x, _, of_bias, of_left, of_right, _, of_dropped = ctx.needs_input_grad
        gx = gb = gl = gr = gd = None
        g = g.contiguous()  # attention gives another one, which each use would copy
        columns = _columns(g)
        if of_bias:
            gb = columns.sum((0, 2))
        if of_left:
            if not of_right and torch.is_grad_enabled():
                raise RuntimeError(
                    "a delta whose first factor is frozen (lora_fa, vera) keeps no inputs, so that "
                    "its gradient has none: train both factors, or differentiate by torch.func"
                )
            hidden = product(right, _columns(kept)) if of_right else kept
            gl = scaled(outer(hidden, columns).mT.contiguous(), ctx.scale)
        gh = product(scaled(left.mT.contiguous(), ctx.scale), columns)
        if of_right:
            gr = outer(gh, _columns(kept))
        if of_x:
            gx = g @ weight
            if not ctx.drops:
                _rows(gx).baddbmm_(gh.mT, _for_each(right, gh))
        if of_dropped:
            gd = torch.bmm(gh.mT, _for_each(right, gh)).view(ctx.shape)
        return gx, None, gb, gl, gr, None, gd


def outputs(
    x: Tensor,
    seen: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The layer's output, and ``right x`` in parts."""
    y = F.linear(x, weight, bias)
    hidden = product(right, _columns(seen))
    _rows(y).baddbmm_(hidden.mT, _for_each(left.mT.contiguous(), hidden), alpha=scale)
    return y, hidden


def _rows(x: Tensor) -> Tensor:
    """``(parts, rows, features)``, a view of what is contiguous.

    On a processor one product for each part is up to twice as fast as one for all: few rows are
    not spread over its cores.
    """
    rows = x.numel() // max(1, x.shape[-1])
    parts = 1
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # one graph for all sizes
        parts = math.gcd(rows, 8 if rows >= 1024 else 2)
    return x.reshape(parts, rows // parts, x.shape[-1])


def _columns(x: Tensor) -> Tensor:
    """``(parts, features, rows)``."""
    return _rows(x).mT


def _for_each(matrix: Tensor, parts: Tensor) -> Tensor:
    return matrix.expand(len(parts), -1, -1)
