"""What fast paths compute with: the operands in one dtype, the delta's own input, who watches."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.cost_model import Form
from gift.kernels.torch_state import autocasts
from gift.private.torch.tracing import is_compiled_by_old, is_exporting, is_transformed

WATCHING: list[Callable[[nn.Module, Form], None]] = []
"""Callbacks that receive each layer and the form chosen for it: see `gift.utils.info.forms`."""


def tell(layer: nn.Module, form: Form) -> None:
    """Tell those that watch which form a layer takes."""
    for watcher in WATCHING:
        watcher(layer, form)


def operands(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[Any] | None:
    """Cast all operands to the dtype in which a layer computes; None if no fast path applies.

    The autograd functions of the fast paths support neither functorch transforms nor TorchScript
    tracing, and return no gradient of the weight. Beside a weight of 16 bits the factors have 32
    bits, and are rounded like all its operands.
    """
    given = [x, weight, *others]
    if weight.requires_grad or not weight.is_floating_point() or x.dim() == 0:
        return None
    if is_transformed() or is_compiled_by_old():
        return None
    kind = x.device.type
    if autocasts(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif x.dtype != weight.dtype:
        return None
    else:
        dtype = weight.dtype
        for tensor in others:
            if tensor is not None and tensor.dtype != dtype:
                break
        else:
            return given
        wider = (t.dtype.itemsize > dtype.itemsize for t in others if t is not None)
        if dtype.itemsize >= 4 and any(wider):
            return None
    return [None if t is None else t.to(dtype) for t in given]


def dropped_inputs(method: Any, x: Tensor, training: bool) -> Tensor | None:
    """Return the delta's input after dropout, or None without dropout."""
    return F.dropout(x, method.dropout) if method.dropout and training else None


def only_beside(x: Tensor, dropped: Tensor | None) -> bool:
    """Whether the delta must be computed beside the frozen weight.

    Merging rounds to 16 bits at the magnitude of the weight, which would lose small deltas. An
    exported program must work for all sizes.
    """
    return dropped is not None or x.dtype.itemsize < 4 or is_exporting() or is_open(x)


def is_open(x: Tensor) -> bool:
    """Whether sizes are symbolic: an outer tracer is active that does not trace into this code.

    The tracer of torch 2.6 does so with layers whose class claims to belong to torch.
    """
    return type(x.numel()) is not int and not torch.compiler.is_compiling()
