"""Random tensors: where parameters start, and buffers that no file holds.

Such buffers are drawn from a seed, on the CPU and in float32 whatever the delta's device and dtype
are, so that a delta finds the same ones wherever it is loaded; all who need the same share one.
"""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from gift.private.torch import writes_of

_buffers: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


def kaiming_uniform(*shape: int, **like: Any) -> Tensor:
    """A matrix or batch of matrices, uniform in ``±1/sqrt(columns)``.

    That is Kaiming's draw with ``a = sqrt(5)``, as of ``nn.Linear``; torch's function would misread
    the fan-in of a batch. Of complex numbers both parts are drawn so.
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
    *more: int,
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """A buffer that is never saved, one object for all layers that ask for the same.

    Nobody has other values to write into it. If somebody has written into it all the same, or has
    moved it, those who ask from then on get a new one.

    Args:
        draw: gives the values, from a generator, the shape and what `more` says.
        seed: of the generator.
        shape: of the buffer.
        more: further arguments of `draw`.
        device: of the buffer; on the meta device nothing is drawn.
        dtype: of the buffer.
    """
    key = (draw, seed, shape, more, dtype, device)
    buffer = _buffers.get(key)
    if buffer is None or writes_of(buffer) != 0 or buffer.device != device:
        if device.type == "meta":
            values = torch.empty(shape, dtype=dtype, device=device)
        else:
            values = draw(torch.Generator().manual_seed(seed), shape, *more).to(device, dtype)
        buffer = nn.Buffer(values, persistent=False)
        if type(buffer) is Tensor:  # no fake one of a tracer
            _buffers[key] = buffer
    return buffer


def entries(generator: torch.Generator, shape: tuple[int, ...], size: int) -> Tensor:
    """Which of `size` entries are chosen: the head of a random permutation.

    Args:
        generator: the source of randomness.
        shape: ``(count,)``, or ``(groups, count)`` for a choice of its own for each group.
        size: the number of entries to choose from.
    """
    *groups, count = shape
    if not groups:
        # A copy: a slice would keep the whole permutation in memory.
        return torch.randperm(size, generator=generator, device="cpu")[:count].clone()
    return torch.stack([entries(generator, (count,), size) for _ in range(groups[0])])


def sorted_entries(generator: torch.Generator, shape: tuple[int, ...], size: int) -> Tensor:
    """The same choice as `entries`, in the order of memory."""
    return entries(generator, shape, size).sort(-1).values
