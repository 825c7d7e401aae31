"""Inputs of layers that are computed again in the backward pass.

The gradient of a delta needs its layer's input. A frozen network does not keep that input, but what
it was computed from: a layer norm and an activation keep their own inputs, attention keeps its
output. `keep` follows the graph from an input upwards, by the table `RULES` of `gift.kernels.ways`,
to tensors that nodes keep. An autograd function saves these in place of the input. That costs no
memory, as they share it with what the nodes keep. Where a node is not in the table, the input
itself is saved.
"""

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gift.kernels.torch_state import Writes, autocasts, gives_no_view
from gift.kernels.ways import CAST, Compute, Way
from gift.private.torch.autograd import Unknown, active_hook, hides_hooks, number_of, output_of
from gift.private.torch.tensors import storage_key, writes_of
from gift.private.torch.tracing import is_followed, is_transformed

FEW = 2**14  # elements, below which to look for a way takes longer than their memory is worth
MANY = 256  # forms of ways to one layer
THIN = 32  # what a factor makes of an input is saved if it is at most this part of the input
DEVICES = ("cpu", "cuda", "xpu", "mps")  # others may have no memory that can be compared
WORK = 30  # multiplications with each element, which a layer does at least for each step of a way


class Kept:
    """How an autograd function restores an input from what it saved: see `keep`.

    Attributes:
        source: ``"input"``, or the operation from which the input is computed again.
    """

    source = "input"

    def value(self, saved: Sequence[Tensor]) -> Tensor:
        """Return the input, which must not be written to.

        Args:
            saved: the tensors that `keep` gave, as ``ctx.saved_tensors`` gives them back.
        """
        return saved[0]


AS_IT_IS = Kept()

WATCHING: list[Callable[[Kept], None]] = []
"""Callbacks that receive how each input is kept: see `gift.utils.info.kept_inputs`."""


class Ways:
    """The ways to the input of one layer that were found so far. A copy starts empty.

    Attributes:
        times: how often each form of a way was found; negative if it led to another tensor.
    """

    __slots__ = ("times",)

    def __init__(self) -> None:
        self.times: dict[Any, int] = {}

    def __reduce__(self) -> Any:
        return Ways, ()


def keep(
    x: Tensor, work: int, ways: Ways | None, *, seldom: bool = False
) -> tuple[Kept, tuple[Tensor, ...]]:
    """Decide how an autograd function keeps an input for its backward pass.

    It is called in `forward` of the function, which saves the tensors by ``ctx.save_for_backward``.

    Args:
        x: the input.
        work: how many multiplications the layer does with each element of `x`.
        ways: what is known of the layer; None keeps the input.
        seldom: whether most backward passes of the function do not need the input.

    Returns:
        The way back, which belongs on `ctx`, and the tensors to save.
    """
    kept: Kept = AS_IT_IS
    tensors: tuple[Tensor, ...] = (x,)
    if ways is not None and _is_usual(x):
        with contextlib.suppress(Unknown):
            kept, tensors = _recomputed(x, work, ways, seldom)
    note(kept)
    return kept, tensors


def note(kept: Kept) -> None:
    """Tell those that watch how an input is kept."""
    for watcher in WATCHING:
        watcher(kept)


def is_small(x: Tensor) -> bool:
    """Whether an input has so few elements that it is kept as it is."""
    return x.numel() <= FEW


def _is_usual(x: Tensor) -> bool:
    """Whether the input has a graph, no one else follows it, and nothing was written to it."""
    return (
        not torch.compiler.is_compiling()
        and x.grad_fn is not None
        and type(x) is Tensor
        and x.layout is torch.strided
        and x.is_floating_point()
        and x.device.type in DEVICES
        and not is_small(x)
        and writes_of(x) == 0
        and not hides_hooks()
        and not is_followed()
        and not is_transformed()
    )


def _recomputed(x: Tensor, work: int, ways: Ways, seldom: bool) -> tuple[Kept, tuple[Tensor, ...]]:
    """Return the way back from what nodes keep; raise `Unknown` if none is worthwhile."""
    found = _HERE.found
    if found is None or not found.leads_to(x):
        found = _HERE.found = _Found(x)
    way = found.way
    if way.steps * found.largest * WORK > work * x.numel():
        raise Unknown  # it takes too long
    if not _is_right(way, found.compute, found.finish, x, ways.times):
        raise Unknown
    shared = _HERE.open.get(found.key)
    if shared is None:
        shared = _HERE.open[found.key] = _Shared(found.compute)
    shared.members += not seldom
    # Autograd does not check what hooks packed for writes.
    written = [] if found.hook is None else [Writes(leaf) for leaf in way.leaves]
    kept = _Recomputed(shared, found.finish, found.source, written)
    return kept, (found.edge, *way.leaves)


class _Found:
    """The way to an input, for all layers that get it one after the other, as query, key and value.

    It is forgotten with the input, so that it holds no memory that the graph does not hold.
    """

    def __init__(self, x: Tensor) -> None:
        """Look for the way; raise `Unknown` if there is none."""
        self.hook = active_hook()
        node, number, self.finish = _before_casts(x)
        self.way = way = Way(x.numel())
        self.compute = way.to(node, number)
        place = storage_key(x)
        if any(storage_key(leaf) == place for leaf in way.leaves):
            raise Unknown  # the input is kept anyway
        self.largest = max([x.numel(), *(leaf.numel() for leaf in way.leaves)])
        self.key = (node.name(), number_of(node), number, *way.places)
        self.source = node.name().removesuffix("Backward0")
        self.writes = [writes_of(leaf) for leaf in way.leaves]
        with torch.enable_grad():
            self.edge = _Edge.apply(x)
        self.x: Callable[[], Tensor | None] = weakref.ref(x, self._forget)

    def leads_to(self, x: Tensor) -> bool:
        """Whether it is the way to `x`, and nothing was written to what it begins with."""
        if self.x() is not x or self.hook is not active_hook():
            return False
        return self.writes == [writes_of(leaf) for leaf in self.way.leaves]

    def _forget(self, _: Any) -> None:
        vars(self).clear()
        self.x = lambda: None


def _before_casts(x: Tensor) -> tuple[Any, int, Callable[[Tensor], Tensor]]:
    """Return the node and the output that was cast to `x`, and what makes `x` of that output.

    Under autocast, each layer casts a shared input separately.
    """
    node, number = x.grad_fn, x.output_nr
    while node is not None and node.name() == CAST:
        if output_of(node, 0)[2] != x.device:
            raise Unknown
        node, number = node.next_functions[0]
    dtype, contiguous = x.dtype, x.is_contiguous()

    def finish(value: Tensor) -> Tensor:
        value = value.to(dtype)
        return value.contiguous() if contiguous else value

    return node, number, finish


class _Recomputed(Kept):
    """An input that is computed again.

    Args:
        shared: a value that other layers may need as well.
        finish: makes the input from that value.
        source: see `Kept`.
        written: tells whether something was written to what it is computed from.
    """

    def __init__(
        self,
        shared: "_Shared",
        finish: Callable[[Tensor], Tensor],
        source: str,
        written: Sequence[Writes],
    ) -> None:
        self.shared, self.finish, self.source, self.written = shared, finish, source, written

    def value(self, saved: Sequence[Tensor]) -> Tensor:
        edge, *leaves = saved
        if any(write.happened() for write in self.written):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: a tensor from which the input of an adapted layer is computed "
                "again; enable_fine_tuning(..., recompute_inputs=False) keeps the input itself"
            )
        with _aside(edge):
            value = self.finish(self.shared.take(leaves))
        return _Joined.apply(value, edge) if torch.is_grad_enabled() else value


@contextlib.contextmanager
def _aside(like: Tensor) -> Iterator[None]:
    """Context without autograd and autocast."""
    kind = like.device.type
    with torch.no_grad():
        if not autocasts(kind):  # to enter a context takes longer than to ask
            yield
            return
        with torch.autocast(kind, enabled=False):
            yield


class _Shared:
    """A value that is computed once for all layers that need it.

    It is held until each of them has read it, or the thread computes another one.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute, self.members = compute, 0
        self.computed: Tensor | None = None
        self.missing = 0  # layers that have not had what is held

    def take(self, leaves: Sequence[Tensor]) -> Tensor:
        value = self.computed
        if value is not None:
            self.missing -= 1
            if self.missing <= 0:
                self.computed = None
            return value
        value = self.compute(leaves)
        last = _HERE.held()
        if last is not None:
            last.computed = None
        if self.members > 1 and not is_transformed():
            self.missing, self.computed = self.members - 1, value
            _HERE.held = weakref.ref(self)
        return value


class _Here(threading.local):
    """The values that the graphs of a thread share, which one is held, and the last way."""

    def __init__(self) -> None:
        self.found: _Found | None = None
        self.open: weakref.WeakValueDictionary[Any, _Shared] = weakref.WeakValueDictionary()
        self.held: Callable[[], _Shared | None] = lambda: None


_HERE = _Here()


class _Edge(torch.autograd.Function):
    """A tensor without memory that represents another one in the graph."""

    @staticmethod
    @gives_no_view
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class _Joined(torch.autograd.Function):
    """A value, in the place that an edge has in the graph: for derivatives of gradients."""

    @staticmethod
    @gives_no_view
    def forward(ctx: Any, value: Tensor, edge: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}


def _is_right(
    way: Way,
    compute: Compute,
    finish: Callable[[Tensor], Tensor],
    x: Tensor,
    met: dict[Any, int],
) -> bool:
    """Whether a way leads to `x`: a layer tries it the 1st, 2nd, 4th, 8th ... time it meets it.

    The names and meanings of what nodes keep may differ between versions of torch, and autograd
    does not see everything that is written to a tensor.
    """
    form = (*way.form, x.dtype, x.device)
    times = met.get(form, 0)
    if times > 0 and times & (times + 1):
        met[form] = times + 1
        return True
    if times < 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    with _aside(x):
        found, low, high = finish(compute(way.leaves)), x.amin(), x.amax()
        if not -math.inf < float(low) < float(high) < math.inf:  # nothing to be seen
            return False
        limit = TOLERANCE.get(x.dtype, 0) * max(abs(float(low)), abs(float(high)))
        right = (found.shape, found.dtype, found.device) == (x.shape, x.dtype, x.device)
        right = right and float((found - x).abs().amax()) <= limit
    if len(met) > MANY:
        met.clear()
    met[form] = times + 1 if right else -1
    return right
