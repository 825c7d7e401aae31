"""Linear layers whose weight tensor parallelism spreads over the processes of a mesh.

Input and output of the layer are `DTensor`. In between, a method's path computes with the parts
that this process holds, as in a layer of that size, and communicates nothing: the output is a part
of the layer's, or a summand. Whoever made the layer parallel reduces that, delta and all.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift.kernels.torch_state import gives_no_view
from gift.support.sharding import is_sharded, joined_parts, local

Placements = tuple[Any, ...]


class Places(NamedTuple):
    """Where tensors of a linear layer lie, for each axis of the mesh.

    Args:
        bias: the bias, if there is one.
        input_gradient: what processes compute of the gradient of the input.
        output: what they compute of the output.
        partial: whether the gradient of a replicated parameter is a sum over the processes.
    """

    bias: Placements
    input_gradient: Placements
    output: Placements
    partial: tuple[bool, ...]


def places_of(x: Any, weight: Any, bias: Any, transposed: bool) -> Places | None:
    """Return where the tensors lie if nothing needs to be moved, and otherwise None.

    Args:
        x: the input.
        weight: the frozen weight.
        bias: the bias, or None.
        transposed: whether the weight is ``(in, out)``.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if not all(map(is_sharded, given)) or x.dim() == 0:
        return None
    if any(tensor.device_mesh != weight.device_mesh for tensor in given):
        return None
    last, rows, columns = x.dim() - 1, Shard(int(transposed)), Shard(int(not transposed))
    found: list[tuple[Any, Any, Any, bool]] = []
    for seen, own in zip(x.placements, weight.placements, strict=True):
        if seen.is_replicate() and own == rows:
            found.append((Shard(0), Partial(), Shard(last), True))
        elif seen == Shard(last) and own == columns:
            found.append((Replicate(), seen, Partial(), True))
        elif own.is_replicate() and (seen.is_replicate() or (seen.is_shard() and seen.dim < last)):
            found.append((Replicate(), seen, seen, seen.is_shard()))
        else:
            return None
    return Places(*zip(*found, strict=True))


def local_operands(x: Any, bias: Any, places: Places) -> tuple[Tensor, Tensor | None]:
    """Return the parts of input and bias with which this process computes."""
    seen: Tensor = x.to_local(grad_placements=places.input_gradient)
    if bias is None:
        return seen, None
    # What is summed over processes has its bias once. Each process gets the whole gradient of it.
    summed = [place.is_partial() for place in places.output]
    partial = [one and not whole for one, whole in zip(places.partial, summed, strict=True)]
    own = local(bias, places.bias, partial)
    sizes = [bias.device_mesh.size(axis) for axis, one in enumerate(summed) if one]
    return seen, _Share.apply(own, sizes) if sizes else own


class _Share(torch.autograd.Function):
    """One of equal shares, whose sum over the processes is the tensor. Torch shares likewise."""

    @staticmethod
    @gives_no_view
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        for size in sizes:
            tensor = tensor / size
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def joined_output(y: Tensor, x: Any, outputs: int, places: Places) -> Tensor:
    """Return the output of the layer, of which this process computed a part or a summand."""
    return joined_parts(y, x.device_mesh, places.output, (*x.shape[:-1], outputs))
