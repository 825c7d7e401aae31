"""Reading an effective weight: made once for as long as nothing changes that it is made from.

A layer may read its weight many times in one forward pass, as experts in a loop and cells of
recurrent networks do. Two things are kept apart for that.

* *The graph.* A function of autograd that stands for making the weight, `_Made`, gives a tensor
  of its shape without memory; it saves nothing, and makes the weight again where its backward pass
  must. So no backward pass frees what another one needs, checkpointing sees no saved tensors
  more or less, and the intermediate results of a method are kept nowhere.
* *The values.* Each reading gives a tensor with the values, `_Held`, which hangs on the first. They
  are known by a weak reference to their memory: while a graph, a loop or a user keeps it, it is
  given to the next reader as well, and nobody keeps it for longer.

What a weight is made from may be written to behind torch's back (``parameter.data.add_(...)``) but
hardly while a network is running. Within one call of a network or of a module with adapted tensors
an effective weight is therefore taken again without a look at the numbers; elsewhere it is made
again, and given up for the one that is alive if both are equal, bit by bit.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gift.kernels.torch_state import autocasts
from gift.private.torch import is_transformed, writes_of


def _nobody() -> None:
    """What a memory that knows nothing gives."""


class Making(Protocol):
    """How an effective weight is made from the tensors that it depends on, the frozen one first."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The weight."""
        ...

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]] | None:
        """For a gradient `g` of the weight, that of each part of which it is made, where there are
        parts that are cheaper than the weight; None where there are none. Only a `differentiable`
        one has a graph.
        """
        ...


class Memory:
    """Where the values of a weight are, which it does not keep. A copy of it knows nothing.

    Attributes:
        reader: gives the tensor that was read last, if somebody keeps it.
    """

    def __init__(self) -> None:
        self.reader: Callable[[], Any] = _nobody
        self._known: tuple[Any, ...] | None = None

    def __reduce__(self) -> Any:
        return Memory, ()

    def put(self, value: Tensor) -> None:
        """Remember where these values are."""
        place = value.storage_offset(), value.shape, value.stride()
        self._known = weakref.ref(value.untyped_storage()), value.dtype, value.device, place

    def get(self) -> Tensor | None:
        """The values, if somebody keeps them."""
        if self._known is None:
            return None
        storage, dtype, device, place = self._known
        alive = storage()
        if alive is None:
            return None
        return torch.empty(0, dtype=dtype, device=device).set_(alive, *place)


@dataclass(eq=False)
class _Entry:
    """An effective weight within one call.

    Args:
        tensors: what it is made from, which keep their identity while they are here.
        making: how.
        graph: its place in the graph; None without gradients.
        memory: its values.
        value: the same, for as long as the module runs that reads it.
    """

    tensors: tuple[Tensor, ...]
    making: Making
    graph: Tensor | None
    memory: Memory
    value: Tensor | None = None


class _Calls(threading.local):
    """What runs in a thread.

    Attributes:
        entries: the effective weights of the outermost call, by what they are made from; None
            while there is no call.
        kept_bytes: of those among them that are kept until it ends.
        begun: how many of such calls there were.
        running: the modules that may read a weight often, each with what it has read.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Any, ...], _Entry] | None = None
        self.kept_bytes = self.begun = 0
        self.running: list[tuple[nn.Module, list[_Entry]]] = []


_CALLS = _Calls()
_FEW_BYTES = 2**24


@contextmanager
def one_call(module: nn.Module, reads_often: bool) -> Iterator[None]:
    """Within it, an effective weight is made once.

    Args:
        module: what is called.
        reads_often: keep the weights of this module until it has run, whoever else needs them.
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
    """How many calls of networks this thread has begun; None while one runs."""
    return _CALLS.begun if _CALLS.entries is None else None


def made_once(
    module: nn.Module, making: Making, tensors: tuple[Tensor, ...], memory: Memory, of: Any
) -> Tensor:
    """An effective weight, the one that there is already or a new one.

    Args:
        module: the module that reads it.
        making: how it is made.
        tensors: from what, the frozen tensor first.
        memory: where its values were when it was read last.
        of: what distinguishes it from other weights that are made from these tensors.
    """
    if not _is_usual(tensors):
        return making(*tensors)
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
            return making(*tensors)  # a mode is on that makes them of another kind
        value = _alive_alike(memory, value)
        memory.put(value)
        if entry is None:
            entry = _Entry(tensors, making, _graph(making, value, tensors), memory)
            if entries is not None:
                entries[state] = entry
        _keep(entry, module, value)
    assert entry is not None
    return value if entry.graph is None else _Held.apply(entry.graph, value)


@dataclass(frozen=True, eq=False)
class Slices:
    """The matrices of an effective weight that is a batch of them, such as that of experts.

    The gradient of one goes to its own factors. Through the whole weight it would have the size of
    all matrices, for each that is read.

    Args:
        left: of each matrix the left factor of its delta.
        right: the right one.
        frozen: the frozen matrices.
    """

    left: Tensor
    right: Tensor
    frozen: Tensor

    def __call__(self, weight: Tensor, index: int) -> Tensor:
        """The matrix at that index of the effective weight."""
        value = weight.detach()[index]
        making = _Sum()
        factors = self.left[index], self.right[index]
        graph = _Made.apply(making, value, self.frozen[index], *factors)
        matrix: Tensor = _Held.apply(graph, value)
        return matrix


class _Sum:
    """A frozen matrix and the product of two factors."""

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
    """The factors of a product and a number, each with its gradient for one of the product."""
    with torch.set_grad_enabled(differentiable):
        g = g.to(left.dtype) if scale == 1 else g.to(left.dtype) * scale
        return [(left, g @ right.mH), (right, left.mH @ g)]


def _graph(making: Making, value: Tensor, tensors: tuple[Tensor, ...]) -> Tensor | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Made.apply(making, value, *tensors)
    return None


def _keep(entry: _Entry, module: nn.Module, value: Tensor) -> None:
    """Keep the values until the module has run, if it is one that may read them often; if they are
    few, until all has run: a cell is called many times.
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
    """The values that somebody keeps, if they are these; otherwise these."""
    known = memory.get() if value.device.type == "cpu" else None  # others would be waited for
    if known is None or _form(known) != _form(value):
        return value
    return known if torch.equal(known, value) else value


def _form(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.device, value.is_inference()


def _is_usual(tensors: tuple[Tensor, ...]) -> bool:
    """Whether they are of no special kind, and nobody else follows what is computed from them."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _modes(device: torch.device) -> tuple[Any, ...]:
    """In which a weight is made."""
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


class _Made(torch.autograd.Function):
    """Stands for making a weight: of its shape, without memory, and read by nobody."""

    @staticmethod
    def forward(ctx: Any, making: Making, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.making, ctx.tensors = making, tensors
        ctx.versions = [writes_of(tensor) for tensor in tensors]
        ctx.cast = _cast(value.device.type)
        ctx.set_materialize_grads(False)
        return value.new_full((), float("nan")).expand(value.shape)  # which would be noticed

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[2:]
        if g is None:
            return (None,) * (2 + len(wanted))
        if _CALLS.entries is not None:  # what learns while it is called changes what it learns
            _CALLS.entries.clear()
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = [
                tensor.view_as(tensor)
                if differentiable
                else tensor.detach().requires_grad_()
                if needs
                else tensor
                for tensor, needs in zip(ctx.tensors, wanted, strict=True)
            ]
            with _autocast(g.device.type, None):
                parts: Any = ctx.making.parts(tensors, g, differentiable)
            _check_unchanged(ctx, from_parts=parts is not None)
            if parts is None:
                with _autocast(g.device.type, ctx.cast):
                    parts = [(ctx.making(*tensors), g)]
        asked = [tensor for tensor, needs in zip(tensors, wanted, strict=True) if needs]
        found = iter(_gradients(parts, asked, differentiable))
        return (None, None, *(next(found) if needs else None for needs in wanted))


def _gradients(
    parts: list[tuple[Tensor, Tensor]], asked: list[Tensor], differentiable: bool
) -> list[Tensor | None]:
    """The gradients of the tensors that are asked for, from those of parts made of them."""
    known = {id(part): gradient for part, gradient in parts}
    are_parts = len({*map(id, asked)} & known.keys()) == len(asked)
    if are_parts and not differentiable and all(part.grad_fn is None for part, _ in parts):
        return [known[id(tensor)] for tensor in asked]  # nothing else is made of them
    trained = [(part, gradient) for part, gradient in parts if part.requires_grad]
    outputs, gradients = [part for part, _ in trained], [gradient for _, gradient in trained]
    return list(
        torch.autograd.grad(
            outputs, asked, gradients, create_graph=differentiable, allow_unused=True
        )
    )


def _check_unchanged(ctx: Any, from_parts: bool) -> None:
    """As autograd does: the gradient is that of the values which the forward pass had."""
    first = int(from_parts)  # the frozen tensor is no factor of a gradient then
    for tensor, version in list(zip(ctx.tensors, ctx.versions, strict=True))[first:]:
        if writes_of(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(tensor.shape)}, of which an adapted "
                f"weight was made, is at version {writes_of(tensor)}, expected version {version}"
            )


class _Held(torch.autograd.Function):
    """The values of a weight at its place in the graph."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None
