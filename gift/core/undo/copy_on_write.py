"""Copy on write: save the values of tensors that someone else's action writes into."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gift.private.torch.operations import BeforeWrites
from gift.private.torch.tensors import storage_key


class CopyOnWrite(BeforeWrites):
    """Context that copies the memory of a tensor before an operation writes into it.

    Only the given tensors are watched, and nothing is copied before the first write.

    Args:
        tensors: parameters and buffers.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors = list(tensors)
        inner = [part for tensor in self.tensors for part in parts_of(tensor)]
        self.storages = {storage_key(t): t.untyped_storage() for t in inner if _has_memory(t)}
        self.kept: dict[int, torch.UntypedStorage] = {}

    def watched(self) -> Iterable[Tensor]:
        """The tensors to watch."""
        return self.tensors

    def before_write(self, tensor: Tensor) -> None:
        """Save the memory of a tensor that is about to be written."""
        for part in parts_of(tensor):
            self._keep(part)

    def _keep(self, tensor: Tensor) -> None:
        if _has_memory(tensor):
            key = storage_key(tensor)
            if key in self.storages and key not in self.kept:
                self.kept[key] = self.storages[key].clone()

    def restore(self) -> None:
        """Restore everything that was written."""
        for key, value in self.kept.items():
            self.storages[key].copy_(value)

    def original(self, tensor: Tensor) -> Tensor | None:
        """A copy of `tensor` as it was before writes, or None if it was not written."""
        if hasattr(tensor, "__tensor_flatten__"):
            return self._rebuilt(tensor)
        storage = self.kept.get(storage_key(tensor)) if _has_memory(tensor) else None
        if storage is None:
            return None
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        return (
            torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *place).clone()
        )

    def _rebuilt(self, tensor: Any) -> Tensor | None:
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        before = {n: self.original(p) for n, p in parts.items() if isinstance(p, Tensor)}
        if all(value is None for value in before.values()):
            return None
        whole = parts | {n: parts[n].clone() if v is None else v for n, v in before.items()}
        shape, stride = tensor.shape, tensor.stride()
        rebuilt: Tensor = type(tensor).__tensor_unflatten__(whole, context, shape, stride)
        return rebuilt


def parts_of(tensor: Any) -> Iterator[Tensor]:
    """The tensors that hold the memory of a tensor: itself, or those that a subclass wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
    elif isinstance(tensor, Tensor):  # not the mesh, to which a DTensor also flattens
        yield tensor


def memory_of(tensor: Tensor) -> Hashable:
    """A key that is equal for all tensors that show the same memory in the same way."""
    parts = list(parts_of(tensor))
    if any(is_lazy(t) or t.layout is not torch.strided for t in parts):
        return id(tensor)
    return tuple((storage_key(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in parts)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not is_lazy(tensor)
