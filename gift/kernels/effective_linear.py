"""A linear layer with an effective weight, of which nothing is kept for the backward pass."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.onednn import matmul
from gift.kernels.recomputed import Ways, is_small, keep
from gift.kernels.torch_state import autocasts, gives_no_view, without_autocast
from gift.layers.table import forwards_of


class Again(Protocol):
    """Computes an effective weight again in a backward pass."""

    def weight(self) -> Tensor:
        """Return the values, with a graph if the backward pass is itself differentiated."""
        ...


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
        outputs = value.shape[1 if transposed else 0]
        ctx.kept, tensors = keep(x, outputs, ways)
        ctx.save_for_backward(*tensors)
        if not transposed:
            return F.linear(x, value, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ value if bias is None else torch.addmm(bias, flat, value)
        return y.view(*x.shape[:-1], outputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        of_x, of_weight, _, of_bias, *_ = ctx.needs_input_grad
        shape, dtype, of = ctx.rest
        gx = gw = gb = None
        g = g.contiguous()
        flat = g.reshape(-1, g.shape[-1])
        if of_x:
            weight = ctx.again.weight().to(dtype)
            gx = matmul(flat, weight.mT if ctx.transposed else weight).view(shape)
        if of_weight:
            seen = ctx.kept.value(ctx.saved_tensors)
            seen = seen.reshape(-1, seen.shape[-1])
            gw = (seen.mT @ flat if ctx.transposed else flat.mT @ seen).to(of)
        if of_bias:
            gb = flat.sum(0)
        return gx, gw, None, gb, None, None, None


def effective_linear(layer: Any, x: Tensor, bias: Tensor | None, transposed: bool) -> Tensor | None:
    """Apply an adapted linear layer by `EffectiveLinear`.

    Args:
        layer: the layer, whose adapted tensor is its weight.
        x: its input.
        bias: its effective bias, or None.
        transposed: whether its weight is ``(in, out)``.

    Returns:
        None where the layer must read its weight itself: without gradients, with small inputs, for
        which looking for a way takes longer than their memory is worth, under transforms.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_small(x):
        return None
    made = layer._gift_made("weight")
    if made is None:
        return None
    return effective_product(x, made, bias, layer._gift_weights["weight"].ways, transposed)


def effective_product(
    x: Tensor, made: Any, bias: Tensor | None, ways: Ways | None, transposed: bool = False
) -> Tensor | None:
    """Multiply by an effective weight, given in its parts; None if dtypes differ.

    Args:
        x: ``(..., in)``.
        made: `graph`, `value` and `again` as in `EffectiveLinear`.
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
        if torch.compiler.is_compiling():
            return None
        try:
            return effective_linear(self, x, self._gift_weight("bias", once=True), transposed)
        except AttributeError:  # a reference to this method outlived the adaptation
            if "_gift_weights" in vars(self):
                raise
            return None

    def linear(self: Any, input: Tensor) -> Tensor:
        output = forward(self, input, transposed=False)
        return nn.Linear.forward(self, input) if output is None else output

    def conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
        output = forward(self, x, transposed=True)
        plain = getattr(type(self), "_gift_plain", type(self))
        return plain.forward(self, x) if output is None else output

    return {
        **dict.fromkeys(forwards_of("linear"), linear),
        **dict.fromkeys(forwards_of("transposed linear"), conv1d_of_transformers),
    }
