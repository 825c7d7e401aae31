"""Cache of effective weights: each is computed once as long as its inputs do not change.

A layer may read its weight many times in one forward pass, as experts in a loop and cells of
recurrent networks do. The cache separates graph and values:

* *The graph.* An autograd function `_Made` represents the computation of the weight. Its output has
  the shape of the weight but no memory. It saves no tensors, and computes the weight again in the
  backward pass where needed. So a backward pass frees nothing that another one needs, checkpointing
  sees the same saved tensors in each pass, and the intermediate results of a method are not stored.
* *The values.* Each read returns a tensor with the values, `_Held`, attached to the first graph
  node. The cache has only a weak reference to their memory. While a graph, a loop or a user keeps
  the memory alive, the next reader gets it too.

Inputs of a weight may be written without torch noticing (``parameter.data.add_(...)``), but hardly
while a network runs. Within one call of a network, or of a module with adapted tensors, a cached
weight is therefore reused without comparing values. Elsewhere it is computed again, and replaced by
the cached one if both are equal bit by bit.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gift.kernels.torch_state import autocasts
from gift.private.torch.tensors import writes_of
from gift.private.torch.tracing import is_transformed


def _nobody() -> None:
    """Weak reference of a memory that refers to nothing."""


class Making(Protocol):
    """A function that computes an effective weight from its inputs, the frozen tensor first."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The effective weight."""
        ...

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Split the gradient `g` of the weight into gradients of parts from which it is made.

        Returns:
            Pairs of a part and its gradient if there are parts cheaper than the weight, else None.
            The gradients have a graph only if `differentiable`.
        """
        ...


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


@dataclass(eq=False)
class _Entry:
    """A cached effective weight within one call.

    Args:
        tensors: its inputs. Holding them here keeps their ids valid.
        making: the function that computes it.
        graph: its node in the graph; None without gradients.
        again: computes it in backward passes.
        memory: a weak reference to its values.
        value: a strong reference to its values, while the module that reads it runs.
    """

    tensors: tuple[Tensor, ...]
    making: Making
    graph: Tensor | None
    again: "Again"
    memory: Memory
    value: Tensor | None = None


class Made(NamedTuple):
    """An effective weight for functions that save none of its values.

    Args:
        graph: its node in the graph, of the shape of the weight but without memory.
        value: its values, which have no graph.
        again: computes the values again in the backward pass.
    """

    graph: Tensor
    value: Tensor
    again: "Again"


class _Calls(threading.local):
    """The running calls of a thread.

    Attributes:
        entries: the cached weights of the outermost call, by their inputs; None outside of a call.
        kept_bytes: size of the cached values that are kept until it ends.
        begun: number of outermost calls so far.
        running: the modules that may read a weight often, each with the entries that it has read.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Any, ...], _Entry] | None = None
        self.kept_bytes = self.begun = 0
        self.running: list[tuple[nn.Module, list[_Entry]]] = []


_CALLS = _Calls()
_FEW_BYTES = 2**24


@contextmanager
def one_call(module: nn.Module, reads_often: bool) -> Iterator[None]:
    """Context in which each effective weight is computed once.

    Args:
        module: the module that is called.
        reads_often: keep the weights of this module alive until it has run.
    """
    calls = _CALLS
    is_outermost = calls.entries is None
    if is_outermost:
        calls.entries, calls.kept_bytes = {}, 0
        calls.begun += 1
    if reads_often:
        calls.running.append((module, []))
    try:
        yield
    finally:
        if reads_often:
            for entry in calls.running.pop()[1]:
                entry.value = None
        if is_outermost:
            calls.entries = None


def calls_so_far() -> int | None:
    """How many calls of networks this thread has begun; None inside a call."""
    return _CALLS.begun if _CALLS.entries is None else None


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
    held: Tensor = _Held.apply(entry.graph, value)
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
) -> tuple[_Entry, Tensor] | None:
    """The entry and the values of a weight; None if a mode of torch returns another type."""
    entries = _CALLS.entries
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
            entry = _Entry(tensors, making, _graph(again, value), again, memory)
            if entries is not None:
                entries[state] = entry
        _keep(entry, module, value)
    assert entry is not None
    return entry, value


@dataclass(frozen=True, eq=False)
class Slices:
    """The matrices of an effective weight that is a batch of them, such as weights of experts.

    The gradient of one matrix goes to its own factors. Through the whole weight, each matrix that
    is read would need a gradient of the size of all matrices.

    Args:
        left: the left factors of the delta, one per matrix.
        right: the right factors.
        frozen: the frozen matrices.
    """

    left: Tensor
    right: Tensor
    frozen: Tensor

    def __call__(self, weight: Tensor, index: int) -> Tensor:
        """The matrix of the effective weight at `index`."""
        value = weight.detach()[index]
        making = _Sum()
        factors = self.left[index], self.right[index]
        tensors = self.frozen[index], *factors
        graph = _Made.apply(Again(making, tensors), value, *tensors)
        matrix: Tensor = _Held.apply(graph, value)
        return matrix


class _Sum:
    """A `Making` of a frozen matrix plus the product of two factors."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        frozen, left, right = tensors
        return (frozen.to(left.dtype) + left @ right).to(frozen.dtype)

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]]:
        frozen, left, right = tensors
        return [(frozen, g), *product_parts(left, right, g, 1, differentiable)]


def product_parts(
    left: Tensor, right: Tensor, g: Tensor, scale: float, differentiable: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of factor and gradient, for ``scale * left @ right`` with the gradient `g`."""
    with torch.set_grad_enabled(differentiable):
        g = g.to(left.dtype) if scale == 1 else g.to(left.dtype) * scale
        return [(left, g @ right.mH), (right, left.mH @ g)]


def _graph(again: "Again", value: Tensor) -> Tensor | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in again.tensors):
        made: Tensor = _Made.apply(again, value, *again.tensors)
        return made
    return None


def _keep(entry: _Entry, module: nn.Module, value: Tensor) -> None:
    """Keep the values alive until the module has run, if it may read them often.

    Small values of other modules stay alive until the outermost call ends, because a cell of a
    recurrent network is called many times.
    """
    calls = _CALLS
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
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _cast(device.type), stream


def _state_of(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.data_ptr(), tensor.dtype, tensor.device
    return id(tensor), writes_of(tensor), tensor.requires_grad, *place


def _cast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if autocasts(kind) else None


def _autocast(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype == _cast(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


class Again:
    """The values of a weight in backward passes, which are computed once for all that need them.

    Args:
        making: the function that computes the weight.
        tensors: its inputs, the frozen tensor first.
    """

    __slots__ = ("_cast", "_held", "_versions", "making", "tensors")

    def __init__(self, making: Making, tensors: tuple[Tensor, ...]) -> None:
        self.making, self.tensors = making, tensors
        self._versions = [writes_of(tensor) for tensor in tensors]
        self._cast = _cast(tensors[0].device.type)
        self._held: tuple[list[Tensor], Tensor] | None = None

    def weight(self) -> Tensor:
        """Return the weight, with a graph if the backward pass is itself differentiated.

        Raises:
            RuntimeError: if an input was written since the forward pass.
        """
        if torch.is_grad_enabled():
            return self.of([tensor.view_as(tensor) for tensor in self.tensors])
        if self._held is None:  # until the node of the weight has its gradient
            tensors = [_leaf(tensor, tensor.requires_grad) for tensor in self.tensors]
            self._held = tensors, self.of(tensors)
        else:
            self.check(0)
        return self._held[1].detach()

    def taken(self) -> tuple[list[Tensor], Tensor] | None:
        """Return the inputs and the weight that `weight` computed last, and hold them no more."""
        held, self._held = self._held, None
        return held

    def is_current(self) -> bool:
        """Whether no input was written since the forward pass began."""
        pairs = zip(self.tensors, self._versions, strict=True)
        return all(writes_of(tensor) == version for tensor, version in pairs)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Compute the weight from these tensors, as in the forward pass."""
        self.check(0)
        with torch.enable_grad(), _autocast(tensors[0].device.type, self._cast):
            return self.making(*tensors)

    def check(self, first: int) -> None:
        """Raise if an input was written since the forward pass, as autograd does for saved ones.

        Args:
            first: the number of the first input that counts.
        """
        for tensor, version in list(zip(self.tensors, self._versions, strict=True))[first:]:
            if writes_of(tensor) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {tuple(tensor.shape)}, of which an "
                    f"adapted weight was made, is at version {writes_of(tensor)}, expected version "
                    f"{version}"
                )


def _leaf(tensor: Tensor, needs: bool) -> Tensor:
    return tensor.detach().requires_grad_() if needs else tensor


class _Made(torch.autograd.Function):
    """Graph node of computing a weight; its output has the shape of the weight but no memory."""

    @staticmethod
    def forward(ctx: Any, again: Again, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.again = again
        ctx.set_materialize_grads(False)
        return value.new_full((), float("nan")).expand(value.shape)  # NaN shows any read

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        again: Again = ctx.again
        wanted = ctx.needs_input_grad[2:]
        taken = again.taken()
        if g is None:
            return (None,) * (2 + len(wanted))
        if _CALLS.entries is not None:  # training inside a call changes the inputs
            _CALLS.entries.clear()
        differentiable = torch.is_grad_enabled()
        tensors = [
            tensor.view_as(tensor) if differentiable else _leaf(tensor, needs)
            for tensor, needs in zip(again.tensors, wanted, strict=True)
        ]
        with torch.enable_grad(), _autocast(g.device.type, None):
            parts = again.making.parts(tensors, g, differentiable)
        if parts is not None:
            again.check(1)  # gradients of parts do not use the frozen tensor
        elif taken is not None and not differentiable:
            tensors, weight = taken
            again.check(0)
            parts = [(weight, g)]
        else:
            parts = [(again.of(tensors), g)]
        asked = [tensor for tensor, needs in zip(tensors, wanted, strict=True) if needs]
        found = iter(_gradients(parts, asked, differentiable))
        return (None, None, *(next(found) if needs else None for needs in wanted))


def _gradients(
    parts: list[tuple[Tensor, Tensor]], asked: list[Tensor], differentiable: bool
) -> list[Tensor | None]:
    """Gradients of the tensors in `asked`, from those of parts that were computed from them."""
    known = {id(part): gradient for part, gradient in parts}
    are_parts = len({*map(id, asked)} & known.keys()) == len(asked)
    if are_parts and not differentiable and all(part.grad_fn is None for part, _ in parts):
        return [known[id(tensor)] for tensor in asked]  # the parts are these tensors
    trained = [(part, gradient) for part, gradient in parts if part.requires_grad]
    outputs, gradients = [part for part, _ in trained], [gradient for _, gradient in trained]
    return list(
        torch.autograd.grad(
            outputs, asked, gradients, create_graph=differentiable, allow_unused=True
        )
    )


class _Held(torch.autograd.Function):
    """The values of a weight, attached to its node in the graph."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None
