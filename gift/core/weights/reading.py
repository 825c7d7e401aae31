"""Cache of effective weights: each is computed once as long as its inputs do not change.

A layer may read its weight many times in one forward pass, as experts in a loop and cells of
recurrent networks do. The cache separates graph and values:

* *The graph.* A node of `gift.core.weights.graph`, which holds no values.
* *The values.* Each read returns a tensor with the values, attached to that node. The cache has
  only a weak reference to their memory. While a graph, a loop or a user keeps the memory alive, the
  next reader gets it too.

Inputs of a weight may be written without torch noticing (``parameter.data.add_(...)``), but hardly
while a network runs. Within one call of a network, or of a module with adapted tensors, a cached
weight is therefore reused without comparing values. Elsewhere it is computed again, and replaced by
the cached one if both are equal bit by bit.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.weights.calls import CALLS, Entry
from gift.core.weights.graph import Again, Making, at_node, cast_of, node_of
from gift.kernels.effective_linear import Made
from gift.private.torch.tensors import writes_of
from gift.private.torch.tracing import is_transformed

_FEW_BYTES = 2**24


def _nobody() -> None:
    """Weak reference of a memory that refers to nothing."""


class Memory:
    """Weak reference to the values of a weight. A copy of it refers to nothing.

    Attributes:
        reader: returns the tensor that was read last, or None if it is gone.
    """

    __slots__ = ("_known", "reader")

    def __init__(self) -> None:
        self.reader: Callable[[], Any] = _nobody
        self._known: tuple[Any, ...] | None = None

    def __reduce__(self) -> Any:
        return Memory, ()

    def put(self, value: Tensor) -> None:
        """Refer to these values."""
        place = value.storage_offset(), value.shape, value.stride()
        self._known = weakref.ref(value.untyped_storage()), value.dtype, value.device, place

    def get(self) -> Tensor | None:
        """The values if something keeps them alive, else None."""
        if self._known is None:
            return None
        storage, dtype, device, place = self._known
        alive = storage()
        if alive is None:
            return None
        return torch.empty(0, dtype=dtype, device=device).set_(alive, *place)


def made_once(
    module: nn.Module, making: Making, tensors: tuple[Tensor, ...], memory: Memory, of: Any
) -> Tensor:
    """Return the cached effective weight, or compute it.

    Args:
        module: the module that reads it.
        making: the function that computes it.
        tensors: its inputs, the frozen tensor first.
        memory: a weak reference to the values that were read last.
        of: distinguishes it from other weights with the same inputs.
    """
    found = _found(module, making, tensors, memory, of) if _is_usual(tensors) else None
    if found is None:
        return making(*tensors)
    entry, value = found
    if entry.graph is None:
        return value
    held = at_node(entry.graph, value)
    held.__dict__["_gift_made"] = Made(entry.graph, value, entry.again)  # for `multiplying`
    return held


def made(
    module: nn.Module, making: Making, tensors: tuple[Tensor, ...], memory: Memory, of: Any
) -> Made | None:
    """Return the weight as `made_once` does, in its parts.

    Returns:
        None if no gradients are recorded, or a compiler, a transform or a mode of torch observes
        the tensors.
    """
    found = _found(module, making, tensors, memory, of) if _is_usual(tensors) else None
    if found is None:
        return None
    entry, value = found
    return None if entry.graph is None else Made(entry.graph, value, entry.again)


def _found(
    module: nn.Module, making: Making, tensors: tuple[Tensor, ...], memory: Memory, of: Any
) -> tuple[Entry, Tensor] | None:
    """The entry and the values of a weight; None if a mode of torch returns another type."""
    entries = CALLS.entries
    state = (of, *_modes(tensors[0].device), *map(_state_of, tensors))
    entry = None if entries is None else entries.get(state)
    value = None
    if entry is not None:
        value = entry.memory.get() if entry.value is None else entry.value
    if value is None:
        with torch.no_grad():
            value = making(*tensors)
        if type(value) is not Tensor:
            return None
        value = _alive_alike(memory, value)
        memory.put(value)
        if entry is None:
            again = Again(making, tensors)
            entry = Entry(tensors, node_of(again, value), again, memory)
            if entries is not None:
                entries[state] = entry
        _keep(entry, module, value)
    assert entry is not None
    return entry, value


def _keep(entry: Entry, module: nn.Module, value: Tensor) -> None:
    """Keep the values alive until the module has run, if it may read them often.

    Small values of other modules stay alive until the outermost call ends, because a cell of a
    recurrent network is called many times.
    """
    calls = CALLS
    for running, kept in calls.running:
        if running is module:
            entry.value = value
            kept.append(entry)
            return
    if calls.entries is not None and calls.kept_bytes + value.nbytes <= _FEW_BYTES:
        entry.value = value  # until the outermost call ends
        calls.kept_bytes += value.nbytes


def _alive_alike(memory: Memory, value: Tensor) -> Tensor:
    """The values that are still alive, if equal to `value`; else `value`."""
    known = memory.get() if value.device.type == "cpu" else None  # others need a synchronization
    if known is None or _form(known) != _form(value):
        return value
    return known if torch.equal(known, value) else value


def _form(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.device, value.is_inference()


def _is_usual(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all are plain tensors, and no compiler or function transform observes them."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _modes(device: torch.device) -> tuple[Any, ...]:
    """The modes of torch on which the computation of a weight depends."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast_of(device.type), stream


def _state_of(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.data_ptr(), tensor.dtype, tensor.device
    return id(tensor), writes_of(tensor), tensor.requires_grad, *place
