"""What is made of a frozen tensor and of a few trained ones, remembered between calls.

In generation a layer is called for each token, and nothing that it is made of changes in between.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gift.kernels.torch_state import autocasts
from gift.private.torch.tensors import writes_of
from gift.private.torch.tracing import is_transformed

Tensors = tuple[Tensor | None, ...]
T = TypeVar("T", bound=Tensors)

_PLAIN = (Tensor, nn.Parameter)


class Remembered:
    """Tensors that were made in the last call without gradients. A copy of it remembers nothing.

    The frozen tensor counts as unchanged while it is the same object, at the same place, and
    autograd has counted no write to it. Trained tensors are compared by value with copies: averages
    of weights are written by ``.data``, which autograd does not count. It takes a small part of the
    time of making what is remembered.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: _Made | None = None

    def __reduce__(self) -> tuple[type["Remembered"], tuple[()]]:
        return Remembered, ()

    def get(
        self, make: Callable[[], T], method: Any, frozen: Tensor, trained: Sequence[Tensor | None]
    ) -> T:
        """Return what `make` gives, if possible without calling it.

        Args:
            make: computes tensors from `method`, `frozen` and `trained` alone.
            method: an object that is never written to.
            frozen: a tensor that is hardly ever written to.
            trained: tensors that are small beside it; or None.
        """
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled():
            self._last = None  # in training it would be outdated after each step
            return make()
        if is_transformed() or autocasts("cpu"):
            return make()
        last = self._last
        if last is not None and last.is_of(method, frozen, trained):
            return last.value  # type: ignore[return-value]  # `make` gave it
        value = make()
        if writes_of(frozen) is not None and _can_tell(frozen, *trained, *value):
            copies = tuple(None if t is None else t.detach().clone() for t in trained)
            self._last = _Made(value, method, weakref.ref(frozen), _state_of(frozen), copies)
        return value


class _Made(NamedTuple):
    """Tensors, and what they were made of.

    Args:
        value: the tensors.
        method: the method.
        frozen: a weak reference to the frozen tensor.
        state: version and place of that tensor.
        copies: copies of the trained tensors.
    """

    value: Tensors
    method: Any
    frozen: Callable[[], Tensor | None]
    state: tuple[int | None, int]
    copies: Tensors

    def is_of(self, method: Any, frozen: Tensor, trained: Sequence[Tensor | None]) -> bool:
        """Whether the same tensors would be made again."""
        if self.frozen() is not frozen or self.state != _state_of(frozen):
            return False
        if self.method is not method or not _can_tell(*trained):
            return False
        for copy, tensor in zip(self.copies, trained, strict=True):
            if copy is None or tensor is None:
                if copy is not tensor:
                    return False
            elif copy.dtype != tensor.dtype or not torch.equal(copy, tensor):
                return False
        return True


def _state_of(frozen: Tensor) -> tuple[int | None, int]:
    return writes_of(frozen), frozen.data_ptr()


def _can_tell(*tensors: Tensor | None) -> bool:
    """Whether changes of the tensors can be noticed.

    For each comparison one would have to wait for an accelerator.
    """
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return False
    return True
