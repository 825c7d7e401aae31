"""A linear layer with a low-rank delta, in the products that are fast for few rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankLinear(torch.autograd.Function):
    """``W x + bias + left right x``, or with ``dropped`` for the second `x`.

    For the backward pass it keeps the inputs as they are given if `right` is trained, and ``right
    x`` if `left` is. Gradients are made of operations with gradients of their own.

    Args (of `apply`):
        x: ``(..., in)``.
        weight: frozen, ``(out, in)``.
        bias: or None.
        left, right: the factors ``(out, rank)`` and ``(rank, in)``.
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
        dropped: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        hidden = F.linear(x if dropped is None else dropped, right)
        y.view(-1, len(left)).addmm_(hidden.view(-1, len(right)), left.mT)
        ctx.shape, ctx.drops = x.shape, dropped is not None
        of_left, of_right = ctx.needs_input_grad[3:5]
        seen = (x if dropped is None else dropped) if of_right else None
        ctx.save_for_backward(seen, weight, left, right, hidden if of_left else None)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        seen, weight, left, right, hidden = ctx.saved_tensors
        of_x, _, of_bias, of_left, of_right, of_dropped = ctx.needs_input_grad
        gx = gb = gl = gr = gd = None
        rows = g.reshape(-1, g.shape[-1])
        if of_bias:
            gb = rows.sum(0)
        if of_left:
            if torch.is_grad_enabled():  # what was kept has no graph
                hidden = _again(seen, right)
            gl = (hidden.view(-1, len(right)).mT @ rows).mT.contiguous()
        through = of_dropped or (of_x and not ctx.drops)
        gh = F.linear(rows, left.mT.contiguous()) if of_right or through else None
        if gh is not None and of_right:
            gr = gh.mT @ seen.reshape(-1, seen.shape[-1])
        if of_x:
            gx = rows @ weight
            if gh is not None and not ctx.drops:
                gx.addmm_(gh, right)
            gx = gx.view(ctx.shape)
        if gh is not None and of_dropped:
            gd = (gh @ right).view(ctx.shape)
        return gx, None, gb, gl, gr, gd


def _again(seen: Tensor | None, right: Tensor) -> Tensor:
    if seen is None:
        raise RuntimeError(
            "a delta whose first factor is frozen keeps no inputs, so that its gradient has none: "
            "train both factors (lora instead of lora_fa) where gradients of gradients are needed"
        )
    return F.linear(seen, right)
