"""Tensors that are spread over the processes of a mesh: the `DTensor` of torch.

``torch.distributed.tensor`` takes long to import, and whoever has such a tensor has imported it. So
it is imported where it is used.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes, each of which holds a part or a copy."""
    return hasattr(tensor, "device_mesh")


def is_fully_sharded(network: nn.Module) -> bool:
    """Whether a part of the network is under FSDP2, which gathers its parameters for each call."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in network.modules())


def whole(tensor: Any) -> Any:
    """Return the full tensor in each process, all of which must call this; others unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shape_only(tensor: Any) -> Tensor:
    """Return zeros in the full shape of a spread tensor, which take no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.to_local().device).expand(tensor.shape)


def distributed(value: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """Spread a full tensor; its values are those that the first process of the mesh has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements)


def distributed_like(value: Tensor, tensor: Any) -> Tensor:
    """Spread a full tensor as another one is, on the device of that one."""
    spread: Tensor = distributed(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return spread


def local(tensor: Any, placements: tuple[Any, ...], partial: Sequence[bool]) -> Tensor:
    """Return the part of a tensor that this process computes with.

    Args:
        tensor: a spread tensor.
        placements: where its parts must be: sharded or replicated.
        partial: for each axis of the mesh, whether the gradient of a replicated tensor is the sum
            of what the processes along the axis compute. The backward pass then adds these up.
    """
    from torch.distributed.tensor import Partial

    gradient = tuple(
        Partial() if sums and place.is_replicate() else place
        for place, sums in zip(placements, partial, strict=True)
    )
    if not torch.is_grad_enabled() or not tensor.requires_grad:
        gradient = placements
    if gradient != placements or tensor.placements != placements:
        # Also if nothing moves: the backward pass of this is what adds up the gradient.
        tensor = tensor.redistribute(placements=placements)
    part: Tensor = tensor.to_local(grad_placements=gradient)
    return part


def joined_parts(
    part: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]
) -> Tensor:
    """Return the contiguous tensor of that shape of which this process computed a part."""
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
    return made


def agree(tensors: Iterable[Tensor], mesh: Any) -> None:
    """Give each process of a mesh the values that its first one has, of tensors that all hold."""
    from torch.distributed.tensor import DTensor, Replicate

    with torch.no_grad():
        for tensor in tensors:
            everywhere = [Replicate()] * mesh.ndim
            same = DTensor.from_local(tensor.detach(), mesh, everywhere, run_check=True)
            tensor.copy_(same.to_local())
