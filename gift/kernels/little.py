"""Low-rank deltas of layers that do little, by operations that torch itself differentiates.

The forms of `gift.kernels.cost_model` are autograd functions in Python. They save memory and
multiplications, and take 0.2 to 0.5 ms for their two passes, whatever they compute. A layer of a
small network takes less than that.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels import depthwise
from gift.kernels.cost_model import Form
from gift.kernels.geometry import Geometry
from gift.kernels.low_rank_conv import effective_of
from gift.kernels.operands import tell
from gift.kernels.products import rows_of
from gift.kernels.recomputed import AS_IT_IS, is_small, note

LITTLE = 2**21  # multiplications of a convolution; 0 leaves all layers to the autograd functions
MODEST = 2**16  # elements of an input that is kept for their sake


def little_linear(
    layer: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    scale: float,
) -> Tensor | None:
    """Compute ``W x + bias + s left right x``; None if a form of its own is worth its time.

    Inputs above those that are kept anyway are left to the forms: linear layers share theirs, in
    large networks, where memory counts.
    """
    if not _differentiates() or not is_small(x):
        return None
    _tell(layer, "side")
    y = F.linear(x, weight, bias)  # first, as it says what is wrong with an input
    rows = rows_of(x)  # else torch may multiply trained factors in another order
    return torch.add(y, F.linear(F.linear(rows, right), left).view(y.shape), alpha=scale)


def little_conv(
    layer: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    scale: float,
    geometry: Geometry,
) -> Tensor | None:
    """Compute ``conv(x, W + s left right) + bias``; None if a form of its own is worth its time.

    Args:
        layer: which computes it.
        x: ``(batch, in, *positions)``.
        weight: the frozen weight.
        bias: or None.
        left: factors as `gift.kernels.low_rank_conv.LowRankConv` has them, as is `right`.
        right: see `left`.
        scale: `s`.
        geometry: the convolution.
    """
    if not _differentiates():
        return None
    work = x.numel() * geometry.taps * geometry.shape[0] // geometry.groups
    if not is_small(x) and (work >= LITTLE or x.numel() > MODEST):
        return None
    if geometry.groups == 1 and not geometry.transposed and len(left) == geometry.shape[0]:
        _tell(layer, "side")
        y = geometry.apply(x, weight, bias)
        hidden = geometry.apply(x, right.reshape(-1, *geometry.shape[1:]))
        ones, zeros = [1] * len(geometry.kernel), [0] * len(geometry.kernel)
        point = left.reshape(*left.shape, *ones)
        side = torch.convolution(hidden, point, None, ones, zeros, ones, False, zeros, 1)
        return torch.add(y, side, alpha=scale)
    # Autograd keeps the effective weight. Beside a weight of 16 bits, a small delta would be lost.
    if geometry.taps <= depthwise.FEW and weight.numel() <= x.numel() and x.dtype.itemsize >= 4:
        _tell(layer, "whole")
        return geometry.apply(x, effective_of(weight, left, right, scale, geometry), bias)
    return None


def _differentiates() -> bool:
    return LITTLE > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _tell(layer: Any, form: Form) -> None:
    tell(layer, form)
    note(AS_IT_IS)
