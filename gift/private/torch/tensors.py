"""Tensors: what subclasses of them may override, how often one was written, what shares memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gift.private.torch.parts import part

PARTS = (
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._disabled_torch_function_impl",
    "torch.Tensor._version",
    "torch.UntypedStorage._cdata",
)

OVERRIDES_NOTHING: Any = part("torch._C._disabled_torch_function_impl")
"""The ``__torch_function__`` of a tensor class that overrides no function. torch's notes on
extending it name this and the next part, in private places. None if it is gone."""

_as_plain = part("torch._C.DisableTorchFunctionSubclass")


def can_guard() -> bool:
    """Whether a tensor subclass can inspect functions and then run them as for plain tensors.

    If not, there is no such subclass, and effective weights are not guarded.
    """
    return OVERRIDES_NOTHING is not None and _as_plain is not None


def as_plain_tensors() -> AbstractContextManager[Any]:
    """A context in which no tensor subclass overrides functions."""
    context: AbstractContextManager[Any] = _as_plain()
    return context


def writes_of(tensor: Tensor) -> int | None:
    """How often a tensor was written, as counted by autograd; None if torch does not tell.

    Autograd's public notes and errors mention this version counter, but only the private name gives
    it. Tensors of inference mode have none.
    """
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def written_since(tensor: Tensor) -> Callable[[], bool]:
    """Return a function that tells whether the tensor has been written since now: see `writes_of`.

    Without a version counter, it compares values with a copy. For tensors of inference mode, writes
    cannot be detected.
    """
    if tensor.is_inference():
        return lambda: False
    before = writes_of(tensor)
    if before is not None:
        return lambda: writes_of(tensor) != before
    values = tensor.detach().clone()
    return lambda: not torch.equal(tensor.detach(), values)


def storage_key(tensor: Tensor) -> int:
    """A number that is equal for all tensors that share memory.

    The public address of the memory would do, but fake memory has none.
    """
    storage = tensor.untyped_storage()
    key: int | None = getattr(storage, "_cdata", None)
    return storage.data_ptr() if key is None else key
