"""Scale each output or input by a factor, for methods that scale the activations of a layer."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gift.kernels.recomputed import AS_IT_IS, Kept, Ways, keep
from gift.kernels.torch_state import Writes, gives_no_view
from gift.private.torch.tracing import is_transformed

Compute = Callable[..., Tensor]


def rescaled(
    z: Tensor,
    ratio: Tensor,
    bias: Tensor | None,
    compute: Compute,
    inputs: tuple[Tensor | None, ...],
    channel: int = -1,
    ways: Ways | None = None,
) -> Tensor:
    """Compute ``ratio o (z - bias) + bias`` in the dtype of `z`; exactly `z` for a ratio of one.

    Args:
        z: outputs of a layer, bias included.
        ratio: a factor for each output feature, as `finite` gives it.
        bias: the part of `z` that is not scaled, as `finite` gives it, or None.
        compute: function that computes `z` again.
        inputs: arguments of `compute`.
        channel: the axis of output features, from the end.
        ways: what is known of the inputs of the layer, see `gift.kernels.recomputed.keep`.
    """
    if _is_plain(z, ratio):
        return _scale(z, ratio, bias)
    y: Tensor = Rescaled.apply(z, ratio, bias, channel, compute, ways, *inputs)
    return y


def finite(ratio: Tensor, bias: Tensor | None, channel: int = -1) -> tuple[Tensor, Tensor | None]:
    """Return ratio and bias in the shape of the axis of output features and those after it.

    Outputs with an infinite bias, which cannot be subtracted again, get a ratio of one.
    """
    shape = (-1, *[1] * (-1 - channel))
    ratio = ratio.view(shape)
    if bias is None:
        return ratio, None
    bias = bias.view(shape)
    is_finite = bias.abs() < math.inf
    return torch.where(is_finite, ratio, 1), torch.where(is_finite, bias, 0)


def _is_plain(z: Tensor, ratio: Tensor) -> bool:
    """Whether to leave the computation to plain autograd, or to the tracer."""
    return (
        not (torch.is_grad_enabled() and ratio.requires_grad)
        or z.is_complex()
        or torch.compiler.is_compiling()
        or is_transformed()
    )


def _scale(z: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    y = z * ratio if bias is None else torch.addcmul((1 - ratio) * bias, z, ratio)
    return y.to(z.dtype)


class Rescaled(torch.autograd.Function):
    """The autograd function of `rescaled`, which avoids saving `z` for the ratio's gradient.

    Nothing else saves `z`. So this function saves its own output, which the next operation usually
    saves too, and divides it by the ratio. If the next operation has overwritten that output, `z`
    is computed again. If a ratio is too small to divide by, `z` is saved. It is also saved on
    accelerators, which would have to synchronise to check the ratio.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any,
        z: Tensor,
        ratio: Tensor,
        bias: Tensor | None,
        channel: int,
        compute: Compute,
        ways: Ways | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        y = _scale(z, ratio, bias)
        ctx.rest = channel, compute, z.dtype
        ctx.divides = y.device.type == "cpu" and bool(ratio.abs().amin() > 2**-4)
        ctx.writes = Writes(y)
        ctx.kept, saved = [], list[Tensor | None]()
        for tensor in inputs:
            kept, tensors = _kept(tensor, ratio.numel(), ways)
            ctx.kept.append((kept, len(tensors)))
            saved += tensors
        # Saving the output itself would raise an error once it is overwritten.
        ctx.save_for_backward(y.data if ctx.divides else z, ratio, bias, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        kept, ratio, bias, *saved = ctx.saved_tensors
        channel, compute, dtype = ctx.rest
        of_z, of_ratio, of_bias, *_ = ctx.needs_input_grad
        gz = (g * ratio).to(dtype) if of_z else None
        total = None if bias is None else _total(g, channel, ratio)
        divides = ctx.divides
        if divides and (ctx.writes.happened() or torch.is_grad_enabled()):
            each = iter(saved)
            inputs = [how.value(list(islice(each, count))) for how, count in ctx.kept]
            kept, divides = compute(*inputs), False
        gr = None
        if of_ratio:
            gr = _total(g * kept.to(ratio.dtype), channel, ratio)
            if total is not None:
                gr = gr - bias * total
            if divides:
                gr = gr / ratio
        gb = (1 - ratio) * total if total is not None and of_bias else None
        return gz, gr, gb, None, None, None, *(None for _ in ctx.kept)


def scaled_input(x: Tensor, factor: Tensor, channel: int, work: int, ways: Ways | None) -> Tensor:
    """Compute ``factor o x`` in the dtype of `x`.

    Args:
        x: inputs of a layer.
        factor: a factor for each input feature, in the shape of the axis of input features and
            those after it.
        channel: the axis of input features, from the end.
        work: how many multiplications the layer does with each element of `x`.
        ways: what is known of the inputs of the layer, see `gift.kernels.recomputed.keep`.
    """
    if _is_plain(x, factor):
        return (x * factor).to(x.dtype)
    y: Tensor = ScaledInput.apply(x, factor, channel, work, ways)
    return y


class ScaledInput(torch.autograd.Function):
    """The autograd function of `scaled_input`, which saves what `x` is computed from.

    See `gift.kernels.recomputed`.
    """

    @staticmethod
    @gives_no_view
    def forward(  # noqa: D102 - as the class says
        ctx: Any, x: Tensor, factor: Tensor, channel: int, work: int, ways: Ways | None
    ) -> Tensor:
        ctx.channel = channel
        ctx.kept, tensors = keep(x, work, ways)
        ctx.save_for_backward(factor, *tensors)
        return (x * factor).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: D102
        factor, *saved = ctx.saved_tensors
        of_x, of_factor, *_ = ctx.needs_input_grad
        x = ctx.kept.value(saved)
        gx = (g * factor).to(x.dtype) if of_x else None
        gf = _total(g * x.to(factor.dtype), ctx.channel, factor) if of_factor else None
        return gx, gf, None, None, None


def _kept(
    tensor: Tensor | None, work: int, ways: Ways | None
) -> tuple[Kept, tuple[Tensor | None, ...]]:
    """Return how to keep an argument of `compute`, which few backward passes need."""
    return (AS_IT_IS, (None,)) if tensor is None else keep(tensor, work, ways, seldom=True)


def _total(tensor: Tensor, channel: int, like: Tensor) -> Tensor:
    """Sum over all axes but the features, in the shape and dtype of `like`."""
    tensor = tensor.to(like.dtype)
    if channel < -1:
        tensor = tensor.flatten(channel + 1).sum(-1)
    return tensor.reshape(-1, tensor.shape[-1]).sum(0).view(like.shape)
