"""Inputs that a method changes before a layer's own product, as rotations do."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gift.kernels.recomputed import Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast
from gift.private.torch.tracing import is_transformed

Change = Callable[..., Tensor]


def times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Multiply rows by a matrix with blocks on its diagonal.

    Args:
        rows: ``(..., rows, columns)``.
        blocks: ``(..., n, b, b)`` with ``n b`` columns, or one block for all.
    """
    parts = rows.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum("...rni,...nij->...rnj", parts, blocks).flatten(-2)


def changed(
    change: Change, x: Tensor, tensors: Sequence[Tensor], work: int, ways: Ways | None
) -> Tensor:
    """Return ``change(x, *tensors)`` and keep no more for the backward pass than a frozen layer.

    Args:
        change: gives a tensor of the shape and dtype of `x`. The backward pass computes it again.
        x: ``(..., columns)``.
        tensors: what else it depends on.
        work: how many multiplications the layer does with each element of `x`.
        ways: what is known of the inputs of the layer, see `gift.kernels.recomputed.keep`.
    """
    if is_transformed() or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return change(x, *tensors)
    output: Tensor = ChangedInput.apply(change, x, work, ways, *tensors)
    return output


class ChangedInput(torch.autograd.Function):
    """The autograd function of `changed`; its backward pass is differentiable."""

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any, change: Change, x: Tensor, work: int, ways: Ways | None, *tensors: Tensor
    ) -> Tensor:
        ctx.change, ctx.count = change, len(tensors)
        ctx.kept, saved = keep(x, work, ways)
        ctx.save_for_backward(*tensors, *saved)
        return change(x, *tensors)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        saved = ctx.saved_tensors
        inputs = [ctx.kept.value(saved[ctx.count :]), *saved[: ctx.count]]
        of_x, _, _, *of_tensors = ctx.needs_input_grad[1:]
        wanted = [of_x, *of_tensors]
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            if not differentiable:
                inputs = [
                    one.detach().requires_grad_(needs)
                    for one, needs in zip(inputs, wanted, strict=True)
                ]
            inputs = [one.view_as(one) for one in inputs]
            y = ctx.change(*inputs)
            asked = [one for one, needs in zip(inputs, wanted, strict=True) if needs]
            made = iter(torch.autograd.grad(y, asked, g, create_graph=differentiable))
        gx, *rest = (next(made) if needs else None for needs in wanted)
        return (None, gx, None, None, *rest)
