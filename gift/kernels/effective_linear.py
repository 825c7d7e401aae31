"""A linear layer with an effective weight, of which nothing is kept for the backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gift.kernels.onednn import matmul
from gift.kernels.products import linear_output, rows_of
from gift.kernels.recomputed import Ways, is_small, keep
from gift.kernels.torch_state import autocasts, gives_no_view, without_autocast
from gift.layers.table import forwards_of


class Again(Protocol):
    """Computes an effective weight again in a backward pass."""

    def weight(self) -> Tensor:
        """Return the values, with a graph if the backward pass is itself differentiated."""
        ...


class Made(NamedTuple):
    """An effective weight for functions that save none of its values.

    Args:
        graph: its node in the graph, of the shape of the weight but without memory.
        value: its values, which have no graph.
        again: computes the values again in the backward pass.
    """

    graph: Tensor
    value: Tensor
    again: Again


class EffectiveLinear(torch.autograd.Function):
    """``W' x + bias``, which saves neither `x` nor ``W'`` where both can be computed again.

    The backward pass is differentiable.

    Args (of `apply`):
        x: ``(..., in)``.
        graph: the node of ``W'`` in the graph, a tensor without memory.
        value: the values of ``W'``, ``(out, in)`` or transposed, in the dtype of `x`.
        bias: or None.
        again: computes ``W'`` in the backward pass.
        ways: what is known of the inputs of the layer, see `gift.kernels.recomputed.keep`.
        transposed: whether ``W'`` is ``(in, out)``.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        x: Tensor,
        graph: Tensor,
        value: Tensor,
        bias: Tensor | None,
        again: Again,
        ways: Ways | None,
        transposed: bool,
    ) -> Tensor:
        ctx.again, ctx.transposed = again, transposed
        ctx.rest = x.shape, x.dtype, graph.dtype
        ctx.kept, tensors = keep(x, value.shape[1 if transposed else 0], ways)
        ctx.save_for_backward(*tensors)
        return linear_output(x, value, bias, transposed)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        of_x, of_weight, _, of_bias, *_ = ctx.needs_input_grad
        shape, dtype, of = ctx.rest
        gx = gw = gb = None
        g = g.contiguous()
        flat = rows_of(g)
        if of_x:
            weight = ctx.again.weight().to(dtype)
            gx = matmul(flat, weight.mT if ctx.transposed else weight).view(shape)
        if of_weight:
            seen = rows_of(ctx.kept.value(ctx.saved_tensors))
            gw = (seen.mT @ flat if ctx.transposed else flat.mT @ seen).to(of)
        if of_bias:
            gb = flat.sum(0)
        return gx, gw, None, gb, None, None, None


def made_for(layer: Any, x: Tensor, also_small: bool = False) -> Made | None:
    """Return the effective weight of a layer for an input `x`.

    Args:
        layer: the layer.
        x: its input.
        also_small: whether more than memory is gained, so that small inputs count too.

    Returns:
        None where the layer must read its weight itself: without gradients, with small inputs, for
        which looking for a way takes longer than their memory is worth, under transforms.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if is_small(x) and not also_small:
        return None
    made: Made | None = layer._gift_made("weight")
    return made


def effective_product(
    x: Tensor, made: Made, bias: Tensor | None, ways: Ways | None, transposed: bool = False
) -> Tensor | None:
    """Multiply by an effective weight, given in its parts; None if dtypes differ.

    Args:
        x: ``(..., in)``.
        made: the weight.
        bias: or None.
        ways: as in `EffectiveLinear`.
        transposed: as in `EffectiveLinear`.
    """
    kind, dtype = x.device.type, made.value.dtype
    if autocasts(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif x.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return None
    y: Tensor = EffectiveLinear.apply(
        x.to(dtype),
        made.graph,
        made.value.to(dtype),
        None if bias is None else bias.to(dtype),
        made.again,
        ways,
        transposed,
    )
    return y


def effective_forwards() -> dict[str, Callable[..., Any]]:
    """Return forward functions for methods that have none of their own: see `Method.forwards`."""

    def forward(self: Any, x: Tensor, transposed: bool) -> Tensor | None:
        made = made_for(self, x)
        if made is None:
            return None
        bias, ways = self._gift_weight("bias", once=True), self._gift_weights["weight"].ways
        return effective_product(x, made, bias, ways, transposed)

    def linear(self: Any, input: Tensor) -> Tensor:
        output = forward(self, input, transposed=False)
        return nn.Linear.forward(self, input) if output is None else output

    def conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
        output = forward(self, x, transposed=True)
        return type(self)._gift_plain.forward(self, x) if output is None else output

    return {
        **dict.fromkeys(forwards_of("linear"), linear),
        **dict.fromkeys(forwards_of("transposed linear"), conv1d_of_transformers),
    }
