"""A linear layer with a Kronecker-product delta, as matrix products that are fast for few rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.onednn import matmul
from gift.kernels.products import rows_of
from gift.kernels.recomputed import THIN, Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast


class KroneckerLinear(torch.autograd.Function):
    """``W x + bias + (w1 (x) left right) x``.

    The features of `x` are viewed as a matrix ``X (c, d)``, and the delta is computed as ``left (w1
    X right^T)^T``, since the rank is the smallest size. Without `left`, `right` is the whole right
    Kronecker factor. For the backward pass it saves the inputs as they are given, or what they are
    computed from (see `gift.kernels.recomputed`), and ``X right^T`` only if it is small. The
    backward pass is differentiable.

    Args (of `apply`):
        x: ``(..., c * d)``.
        weight: frozen, ``(a * b, c * d)``.
        bias: or None.
        w1: left Kronecker factor, ``(a, c)``.
        left, right: factors of the right one, ``(b, rank)`` and ``(rank, d)``; or None and the
            right one itself, ``(b, d)``.
        ways: what is known of the inputs of the layer, see `keep`.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        w1: Tensor,
        left: Tensor | None,
        right: Tensor,
        ways: Ways | None = None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        hidden = _hidden(x, w1, right)
        side = _turned(F.linear(hidden, w1), len(right))  # (positions * a, rank)
        if left is None:
            y.view(-1, len(right)).add_(side)
        else:
            y.view(-1, len(left)).addmm_(side, left.mT)
        ctx.kept, tensors = keep(x, len(weight), ways)
        few = hidden if hidden.numel() * THIN <= x.numel() else None
        ctx.save_for_backward(weight, w1, left, right, few, *tensors)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        weight, w1, left, right, hidden, *tensors = ctx.saved_tensors
        x = ctx.kept.value(tensors)
        rank = len(right)
        if hidden is None or torch.is_grad_enabled():  # the saved tensor has no graph
            hidden = _hidden(x, w1, right)
        flat = rows_of(g)
        gb = flat.sum(0) if ctx.needs_input_grad[2] else None
        gl, of_side = None, flat.reshape(-1, rank if left is None else len(left))
        if left is not None:
            gl = (_turned(F.linear(hidden, w1), rank).mT @ of_side).mT.contiguous()
            of_side = F.linear(of_side, left.mT.contiguous())
        gh = _turned(of_side, len(w1))  # (positions * rank, a)
        g1 = gh.mT @ hidden
        gp = _turned(gh @ w1, rank)  # (positions * c, rank)
        gr = gp.mT @ x.reshape(-1, right.shape[1])
        gx = None
        if ctx.needs_input_grad[0]:
            gx = matmul(flat, weight).view(-1, right.shape[1]).addmm_(gp, right).view(x.shape)
        return gx, None, gb, g1, gl, gr, None


def _hidden(x: Tensor, w1: Tensor, right: Tensor) -> Tensor:
    """Compute ``right X^T``, as ``(positions * rank, c)``."""
    return _turned(F.linear(x.reshape(-1, right.shape[1]), right), w1.shape[1])


def _turned(tensor: Tensor, rows: int) -> Tensor:
    """Transpose the matrix of `rows` rows at each position: ``(positions * columns, rows)``."""
    return tensor.view(-1, rows, tensor.shape[1]).mT.reshape(-1, rows)
