"""Random initial values, and random buffers that no file stores.

Such buffers are drawn from a seed, on the CPU and in float32 whatever the delta's device and dtype
are. So a delta finds the same values wherever it is loaded, and layers that need the same buffer
share one.
"""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from gift.private.torch.tensors import writes_of

_buffers: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


def kaiming_uniform(*shape: int, **like: Any) -> Tensor:
    """Draw a matrix or a batch of matrices, uniform in ``±1/sqrt(columns)``.

    This is Kaiming's distribution with ``a = sqrt(5)``, as in ``nn.Linear``. torch's function would
    compute the wrong fan-in for a batch. Complex numbers have both parts drawn in this way.
    """
    tensor = torch.empty(shape, **like)
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bound = 1 / math.sqrt(shape[-1])
    numbers.uniform_(-bound, bound)
    return tensor


def seeded_buffer(
    draw: Callable[..., Tensor],
    seed: int,
    shape: tuple[int, ...],
    *more: float,
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Return a buffer that is never saved, one object for all layers that request the same.

    Nothing should write other values into it. If something has written into it nevertheless, or has
    moved or cast it, later requests get a new one.

    Args:
        draw: function that draws the values, given a generator, the shape and `more`.
        seed: seed of the generator.
        shape: shape of the buffer.
        more: further arguments of `draw`.
        device: device of the buffer; on the meta device nothing is drawn.
        dtype: dtype of the buffer.
    """
    key = (draw, seed, shape, more, dtype, device)
    buffer = _buffers.get(key)
    alike = buffer is not None and (buffer.device, buffer.dtype) == (device, dtype)
    if buffer is None or not alike or writes_of(buffer) != 0:
        if device.type == "meta":
            values = torch.empty(shape, dtype=dtype, device=device)
        else:
            values = draw(torch.Generator().manual_seed(seed), shape, *more).to(device, dtype)
        buffer = nn.Buffer(values, persistent=False)
        if type(buffer) is Tensor:  # not a fake tensor of a tracer
            _buffers[key] = buffer
    return buffer


def uniform(generator: torch.Generator, shape: tuple[int, ...], bound: float) -> Tensor:
    """Draw numbers in ``±bound``."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (2 * drawn - 1) * bound


def entries(generator: torch.Generator, shape: tuple[int, ...], size: int) -> Tensor:
    """Choose some of `size` entries: the head of a random permutation.

    Args:
        generator: the source of randomness.
        shape: ``(count,)``, or ``(groups, count)`` for an independent choice for each group.
        size: the number of entries to choose from.
    """
    *groups, count = shape
    if not groups:
        # A copy: a slice would keep the whole permutation in memory.
        return torch.randperm(size, generator=generator, device="cpu")[:count].clone()
    return torch.stack([entries(generator, (count,), size) for _ in range(groups[0])])


def sorted_entries(generator: torch.Generator, shape: tuple[int, ...], size: int) -> Tensor:
    """Choose the same entries as `entries`, sorted by position in memory."""
    return entries(generator, shape, size).sort(-1).values
