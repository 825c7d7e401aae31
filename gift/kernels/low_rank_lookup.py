"""Embeddings with a low-rank delta, which compute the rows that are looked up and no others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.products import rows_of, scaled
from gift.kernels.torch_state import gives_no_view, without_autocast
from gift.private.torch.tracing import is_compiled_by_old, is_transformed


def lookup(self: Any, input: Tensor) -> Tensor:
    """Look rows up in ``W0`` and in the left factor; use the effective weight if that is cheaper.

    The effective weight of a vocabulary is many times as large as the rows that a batch reads.
    """
    delta, weight = self._gift_weights["weight"], self._gift_frozen("weight")
    method, parameters = delta.whole_delta_of(self)
    if not _is_usual(self, delta, weight) or (method.dropout and self.training):
        return nn.Embedding.forward(self, input)
    if type(input.numel()) is int and len(weight) <= input.numel():
        return nn.Embedding.forward(self, input)
    left, right, scale = method.scaled_low_rank(parameters)
    rows: Tensor = LowRankLookup.apply(input, weight, left, right, scale, self.padding_idx)
    return rows


def _is_usual(layer: Any, delta: Any, weight: Tensor) -> bool:
    """Whether the output is rows of ``W0 + s left right`` without max_norm or the like."""
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and delta.layout is not None
        and delta.layout.is_trivial
        and layer.max_norm is None
        and not layer.scale_grad_by_freq
        and not is_transformed()
        and not is_compiled_by_old()
    )


class LowRankLookup(torch.autograd.Function):
    """Rows of ``W + s left right``, rounded once to the dtype of `W`.

    For the backward pass it saves the indices and the factors alone. The backward pass is
    differentiable.

    Args (of `apply`):
        index: integers of any shape.
        weight: frozen, ``(entries, features)``.
        left, right: the factors ``(entries, rank)`` and ``(rank, features)``.
        scale: `s`.
        padding: the entry whose gradient is left out, or None.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        index: Tensor,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        scale: float,
        padding: int | None,
    ) -> Tensor:
        ctx.rest = scale, padding
        ctx.save_for_backward(index, left, right)
        rows = F.embedding(index, weight).to(torch.promote_types(weight.dtype, left.dtype))
        few = F.embedding(index, left).reshape(-1, left.shape[1])
        # In place, which autocast leaves alone.
        rows.view(-1, rows.shape[-1]).addmm_(few, right, alpha=scale)
        return rows.to(weight.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        index, left, right = ctx.saved_tensors
        scale, padding = ctx.rest
        of_left, of_right = ctx.needs_input_grad[2:4]
        gl = gr = None
        g = g.to(left.dtype)
        if padding is not None:
            g = g.masked_fill((index == padding).unsqueeze(-1), 0)
        flat, places = rows_of(g), index.reshape(-1)
        if of_left:
            rows = scaled(flat @ right.mT, scale)
            gl = torch.zeros_like(left).index_add(0, places, rows)
        if of_right:
            gr = scaled(F.embedding(places, left).mT @ flat, scale)
        return None, None, gl, gr, None, None
