"""Track the rows of a batch inside a network: which tensors have them, along which axis."""

import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gift.bank.axes import (
    ALONG,
    ANYWHERE,
    BROADCASTING,
    COMBINING,
    GROWING,
    PERMUTING,
    PUTTING,
    READS,
    RESHAPING,
    at,
    combined,
    is_whole,
    items_of,
    left_by,
    name_of,
    permuted,
)
from gift.core.forwards import argument_names
from gift.wrappers.arguments import in_order


class Hook:
    """A hook of a module that does nothing in copies of the module."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """Return the result of `call`; None in a copy."""
        return None if self.call is None else self.call(*args)

    def __reduce__(self) -> Any:
        return Hook, ()


class Tracking(TorchFunctionMode):
    """Context manager that tracks where rows are, as far as shapes do not show it.

    A tensor computed from constants only, such as positions, is the same for all rows, whatever the
    length of its axes. A tensor whose axes were permuted has its rows along another axis.

    Args:
        net: the network.
        weights: the weights whose changes are added to the outputs of their layers. Any other
            module that reads them would see the base.
        n_rows: the number of rows.
        dim: axis of the rows in the inputs of layers.
    """

    def __init__(self, net: nn.Module, weights: Collection[Tensor], n_rows: int, dim: int) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.constants = {id(t) for t in (*nn.Module.parameters(net), *net.buffers())}
        self.n_rows = n_rows
        self.dim = dim
        self.batch = n_rows
        self.sizes = {n_rows}  # batch sizes: beam search repeats each row in place
        self.was_called = False
        self._thread = threading.get_ident()
        self._inside: list[nn.Module] = []
        self._same = WeakTensorKeyDictionary()
        self._axes = WeakTensorKeyDictionary()  # axis of rows, if not `dim`; None if unknown
        self._followed = WeakTensorKeyDictionary()  # tensors known to come from the batch
        self._modules = list(net.modules())
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        for module in self._modules:
            self._hooks += self._watch(module)
        return super().__enter__()

    def _watch(self, module: nn.Module) -> Iterator[Any]:
        enter, leave = Hook(self._enter), Hook(self._leave)
        yield module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        yield module.register_forward_hook(leave, always_call=True)

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def is_same(self, tensor: Tensor) -> bool:
        """Return whether a tensor is known to be the same for all rows."""
        return id(tensor) in self.constants or tensor in self._same

    def has_rows(self, tensor: Tensor) -> bool:
        """Return whether a tensor has the rows along `dim`, as far as is known."""
        size, axis = tensor.shape[self.dim], self._axes.get(tensor, self.dim)
        if self.is_same(tensor):  # unless it has a row for each, all equal
            axis = None if tensor.ndim == 1 or not _alike(tensor, self.dim) else axis
        return axis == self.dim and (
            size % self.batch == 0 if self.dim == 0 else size == self.batch
        )

    def now_has_rows(self, tensor: Tensor) -> None:
        """Record that a tensor has the rows along `dim`, whatever it was computed from."""
        self._same.pop(tensor, None)
        self._axes.pop(tensor, None)
        self._followed[tensor] = True

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{type(module).__name__} is computing rows for another thread: rows differ in the "
                "thread of the with block alone"
            )
        self._inside.append(module)
        if len(self._inside) == 1:
            self._begin(module, [*_tensors(in_order(argument_names(type(module)), args, kwargs))])
        self.was_called = True

    def _leave(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self._inside.pop()

    def _begin(self, module: nn.Module, inputs: list[Tensor]) -> None:
        """Find the batch: the first input has it; inputs of other sizes are equal for all rows."""
        for tensor in inputs:
            self.now_has_rows(tensor)
        batches = [tensor for tensor in inputs if tensor.ndim]
        if self.dim != 0:
            self._find(batches)
            return
        if not batches:
            return
        first = batches[0]
        self.batch = len(first)
        if self.batch not in self.sizes:
            raise ValueError(
                f"{type(module).__name__} gets a batch of {self.batch}, expected {self.n_rows} rows"
            )
        for tensor in batches[1:]:
            # A vector as long as the second axis may hold positions, and cannot be distinguished
            # from values for each row.
            either = tensor.ndim == 1 and first.shape[1:2] == tensor.shape
            if len(tensor) != self.batch or either:
                self._same[tensor] = True

    def _find(self, inputs: list[Tensor]) -> None:
        """Find the batch in a network that may get it first, though layers get it along `dim`."""
        for tensor in inputs:
            found = [a for a, size in enumerate(tensor.shape) if size == self.n_rows]
            if self.dim not in found and 0 in found:
                self._axes[tensor] = 0
            elif self.dim not in found:
                self._same[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if name_of(func) == "repeat_interleave" and args[0].shape[:1] == (self.n_rows,):
            self.sizes.update(size for size in result.shape[:1] if size % self.n_rows == 0)
        if name_of(func) == "__iter__":  # over slices, which are tracked too
            result = list(result)
        if self._inside:
            made = [args[0]] if name_of(func) == "__setitem__" else list(_tensors(result))
            if made:
                self._follow(func, [*_tensors(args), *_tensors(kwargs)], args, kwargs, made)
        return iter(result) if name_of(func) == "__iter__" else result

    def _follow(
        self, func: Any, given: list[Tensor], args: Any, kwargs: Any, made: list[Tensor]
    ) -> None:
        for tensor in given:
            if id(tensor) in self.weights and not self._is_own(tensor):
                raise RuntimeError(
                    f"{type(self._inside[-1]).__name__} reads a weight of another layer itself, "
                    "which has no single value while rows differ"
                )
        name = name_of(func)
        read = {"making": [], "first": given[:1], "other": given[1:2], "last_two": given[-2:]}.get(
            READS.get(name, ""), given
        )
        varying = [tensor for tensor in read if not self.is_same(tensor)]
        if not varying:
            self._same.update(dict.fromkeys(made, True))
            return
        # The first tensor decides where the rows are, before masks and the like, unless it was not
        # computed from the batch.
        first = min(varying, key=lambda tensor: (tensor not in self._followed, not tensor.ndim))
        axis = self._axes.get(first, self.dim)
        moved = [
            self._put(name, args, kwargs, axis)
            if name in PUTTING
            else self._moved(name, func, args, kwargs, read, first, tensor, axis)
            for tensor in made
        ]
        for tensor, there in zip(made, moved, strict=True):
            self._same.pop(tensor, None)
            self._axes[tensor] = there
            if first in self._followed:
                self._followed[tensor] = True

    def _moved(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        read: list[Tensor],
        first: Tensor,
        made: Tensor,
        axis: int | None,
    ) -> int | None:
        """Return the axis of the rows in a result, given their axis before; None if unknown."""
        if axis is None or name in ANYWHERE or axis >= first.ndim:
            return None
        if name in PERMUTING:
            return permuted(func, args, kwargs, axis)
        if name == "__getitem__":
            return self._indexed(args[0], args[1], made, axis)
        if name in COMBINING:
            return combined(name, args, kwargs, read, first, made, axis)
        if name in GROWING:  # concatenated batches are not a batch of these rows
            same = made.ndim == first.ndim and made.shape[axis] == first.shape[axis]
            return axis if same else None
        if name in BROADCASTING or (name in ("max", "min") and len(read) > 1):
            return None if made.ndim < first.ndim else axis + made.ndim - first.ndim
        if name in ALONG:
            return left_by(name, args, kwargs, first, made, axis)
        unknown = axis != self.dim and (name in RESHAPING or made.ndim != first.ndim)
        return None if unknown else axis

    def _indexed(self, x: Tensor, index: Any, made: Tensor, axis: int) -> int | None:
        """The same for indexing."""
        if self.is_same(x):  # a table: entries are where the index has them
            is_number = isinstance(index, Tensor) and index.dtype != torch.bool
            return axis if is_number else None
        items = items_of(index, x.ndim)
        if isinstance(items[0], Tensor) and axis == 0 and len(items) > 1:
            dims = [item.ndim for item in items if isinstance(item, Tensor)]
            # Each row is indexed at another position.
            return 0 if max(dims) == 1 and is_whole(items[0], self.batch) else None
        chosen = [isinstance(item, Tensor | list) for item in items if type(item) is not int]
        first, last = (chosen.index(True), chosen[::-1].index(True)) if any(chosen) else (0, 0)
        if any(chosen) and not all(chosen[first : len(chosen) - last]):
            return None  # with separated index tensors, their axis comes first
        there, left = 0, axis
        for item in items:
            if item is None:
                there += 1
            elif left == 0:
                return there if is_whole(item, x.shape[axis]) else None
            elif isinstance(item, Tensor | list):
                return None
            else:
                there, left = there + isinstance(item, slice), left - 1
        return there + left

    def _put(self, name: str, args: Any, kwargs: Any, axis: int | None) -> int | None:
        """Return the axis of the rows after writing values into a tensor at indices."""

        def given(place: int, *names: str) -> Any:
            found = (kwargs[n] for n in names if n in kwargs)
            return next(found, args[place] if len(args) > place else None)

        into = given(0, "input")
        indexed = name in ("__setitem__", "index_put")
        source = given(2, "values") if indexed else given(3, "src", "source", "value", "tensor")
        varies = isinstance(source, Tensor) and not self.is_same(source)
        if self.is_same(into) and varies:
            axis = self._axes.get(source, self.dim)
        if axis is None:
            return None
        if indexed:
            index = given(1, "indices")
            item = at(items_of(index if name == "__setitem__" else tuple(index), into.ndim), axis)
        else:
            along = given(1, "dim")
            item = given(2, "index") if along % into.ndim == axis else slice(None)
        mask = isinstance(item, Tensor) and item.dtype == torch.bool and not self.is_same(item)
        kept = mask or (not varies and not self.is_same(into))
        return axis if kept or is_whole(item, into.shape[axis]) else None

    def _is_own(self, weight: Tensor) -> bool:
        return any(p is weight for p in self._inside[-1]._parameters.values())


def _alike(tensor: Tensor, dim: int) -> bool:
    """Return whether all slices along an axis are equal."""
    return tensor.stride(dim) == 0 or torch.equal(
        tensor.narrow(dim, 0, 1).expand_as(tensor), tensor
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
