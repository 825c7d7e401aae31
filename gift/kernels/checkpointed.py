"""Functions of a layer's input that the backward pass computes again, as checkpoints do."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gift.kernels.recomputed import Ways, keep
from gift.kernels.torch_state import gives_no_view, without_autocast
from gift.private.torch.tracing import is_transformed


def checkpointed(
    function: Callable[..., Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    work: int,
    ways: Ways | None,
) -> Tensor:
    """Return ``function(x, *tensors)``, and keep for the backward pass what a frozen layer keeps.

    Args:
        function: a rotation of the input, or what a delta adds to the output. It draws no random
            numbers.
        x: ``(..., features)``.
        tensors: what else it depends on.
        work: how many multiplications the layer does with each element of `x`.
        ways: what is known of the inputs of the layer, see `gift.kernels.recomputed.keep`.
    """
    if is_transformed() or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x, *tensors)
    output: Tensor = Checkpointed.apply(function, x, work, ways, *tensors)
    return output


class Checkpointed(torch.autograd.Function):
    """The autograd function of `checkpointed`; its backward pass is differentiable."""

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        function: Callable[..., Tensor],
        x: Tensor,
        work: int,
        ways: Ways | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.function, ctx.count = function, len(tensors)
        ctx.kept, saved = keep(x, work, ways)
        ctx.save_for_backward(*tensors, *saved)
        return function(x, *tensors)

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
            y = ctx.function(*inputs)
            asked = [one for one, needs in zip(inputs, wanted, strict=True) if needs]
            made = iter(torch.autograd.grad(y, asked, g, create_graph=differentiable))
        gx, *rest = (next(made) if needs else None for needs in wanted)
        return (None, gx, None, None, *rest)
