"""What the rows of a batch become inside a network: which tensors have them, and where."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


class Tracking(TorchFunctionMode):
    """Within it, what a network computes is followed as far as shapes cannot tell where rows are.

    A tensor made of constants alone (positions, say) is the same for all rows, however long its
    axes are; and one whose axes were permuted has its rows elsewhere.

    Args:
        net: the network.
        weights: of which the changes are added to what their layers give, so that whoever else
            reads them would see the base.
        n_rows: the number of rows.
        dim: their axis in what layers get.
    """

    def __init__(self, net: nn.Module, weights: Collection[Tensor], n_rows: int, dim: int) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.constants = {id(t) for t in (*nn.Module.parameters(net), *net.buffers())}
        self.n_rows = n_rows
        self.dim = dim
        self.batch = n_rows
        self.sizes = {n_rows}  # of batches: beam search repeats rows, each right after itself
        self.was_called = False
        self._inside: list[nn.Module] = []
        self._same = WeakTensorKeyDictionary()
        self._axes = WeakTensorKeyDictionary()  # of rows, where it is not `dim`; None is unknown
        self._modules = list(net.modules())
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        for module in self._modules:
            self._hooks += self._watch(module)
        return super().__enter__()

    def _watch(self, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        yield module.register_forward_hook(self._leave, always_call=True)

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to be the same for all rows."""
        return id(tensor) in self.constants or tensor in self._same

    def has_rows(self, tensor: Tensor) -> bool:
        """Whether a tensor has the rows along `dim`, as far as is known."""
        size, axis = tensor.shape[self.dim], self._axes.get(tensor, self.dim)
        if self.is_same(tensor):  # unless it was made for each row, all alike
            axis = None if tensor.ndim == 1 or not _alike(tensor, self.dim) else axis
        return axis == self.dim and (
            size % self.batch == 0 if self.dim == 0 else size == self.batch
        )

    def now_has_rows(self, tensor: Tensor) -> None:
        """Whatever it was made of, the tensor has the rows along `dim`."""
        self._same.pop(tensor, None)
        self._axes.pop(tensor, None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(module)
        if len(self._inside) == 1:
            self._begin(module, [*_tensors(args), *_tensors(kwargs)])
        self.was_called = True

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _begin(self, module: nn.Module, inputs: list[Tensor]) -> None:
        """The first input has the batch; others of another size are the same for all rows."""
        for tensor in inputs:
            self._same.pop(tensor, None)
            self._axes.pop(tensor, None)
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
            # Numbers for each row cannot be told from positions, if there are as many.
            either = tensor.ndim == 1 and first.shape[1:2] == tensor.shape
            if len(tensor) != self.batch or either:
                self._same[tensor] = True

    def _find(self, inputs: list[Tensor]) -> None:
        """A network whose layers get the batch along another axis may itself get it first."""
        for tensor in inputs:
            found = [a for a, size in enumerate(tensor.shape) if size == self.n_rows]
            if self.dim not in found and 0 in found:
                self._axes[tensor] = 0
            elif self.dim not in found:
                self._same[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _name(func) == "repeat_interleave" and args[0].shape[:1] == (self.n_rows,):
            self.sizes.update(size for size in result.shape[:1] if size % self.n_rows == 0)
        if _name(func) == "__iter__":  # over slices, which are followed as well
            result = list(result)
        if self._inside:
            made = [args[0]] if func is Tensor.__setitem__ else list(_tensors(result))
            if made:
                self._follow(func, [*_tensors(args), *_tensors(kwargs)], args, kwargs, made)
        return iter(result) if _name(func) == "__iter__" else result

    def _follow(
        self, func: Any, given: list[Tensor], args: Any, kwargs: Any, made: list[Tensor]
    ) -> None:
        for tensor in given:
            if id(tensor) in self.weights and not self._is_own(tensor):
                raise RuntimeError(
                    f"{type(self._inside[-1]).__name__} reads a weight of another layer itself, "
                    "which has no single value while rows differ"
                )
        name = _name(func)
        read = {"making": [], "first": given[:1]}.get(_READS.get(name, ""), given)
        if all(map(self.is_same, read)):
            self._same.update(dict.fromkeys(made, True))
            return
        # Where the rows are is taken from what comes first, before masks and the like.
        first = next(tensor for tensor in given if not self.is_same(tensor))
        axis = self._axes.get(first, self.dim)
        for tensor in made:
            self._same.pop(tensor, None)
            self._axes.pop(tensor, None)
            moved = self._moved(name, func, args, kwargs, first, tensor, axis)
            if moved != self.dim:
                self._axes[tensor] = moved

    def _moved(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        first: Any,
        made: Tensor,
        axis: int | None,
    ) -> int | None:
        """Where in a result the rows are that were at an axis; None if that is not known."""
        if axis is None:
            return None
        if name in _PERMUTING:
            return _permuted(func, args, kwargs, axis)
        if name == "__getitem__":
            return self._indexed(args[1], axis)
        if name in _SLICING:
            sliced = _axis(args, kwargs) or 0
            return None if sliced == axis else axis - (sliced < axis)
        if name in _GROWING:  # one batch after the other, which is no batch of these rows
            same = made.ndim == first.ndim and made.shape[axis] == first.shape[axis]
            return axis if same else None
        if axis != self.dim and (name in _RESHAPING or made.ndim != first.ndim):
            return None
        return axis if name not in _CHOOSING or _axis(args, kwargs) != axis else None

    def _indexed(self, index: Any, axis: int) -> int | None:
        """The same for what is read by an index."""
        items = index if isinstance(index, tuple) else (index,)
        if isinstance(items[0], Tensor) and axis == 0 and len(items) > 1:
            # Of each row another place.
            counted = torch.arange(self.batch, device=items[0].device)
            return 0 if torch.equal(items[0], counted) else None
        there = 0
        for item in items:
            if axis < 0 or item is Ellipsis:
                break
            if isinstance(item, Tensor | list):
                return None
            if item is None:
                there += 1
            elif isinstance(item, slice):
                there, axis = there + 1, axis - 1
            elif axis == 0:  # one of them
                return None
            else:
                axis -= 1
        return there + axis

    def _is_own(self, weight: Tensor) -> bool:
        return any(p is weight for p in self._inside[-1]._parameters.values())


_PERMUTING = ("transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "T", "mT")
_RESHAPING = ("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as")
_GROWING = ("cat", "concat", "concatenate", "stack", "repeat", "tile")
_SLICING = ("unbind", "select", "__iter__")
_CHOOSING = ("index_select", "gather", "roll", "flip", "sort", "take_along_dim")
# Whose values come from nowhere, or from the first tensor only.
_READS = dict.fromkeys(
    ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
     "zeros_like", "ones_like", "full_like", "empty_like"), "making",
) | dict.fromkeys(("to", "type_as", "expand_as", "view_as", "reshape_as"), "first")  # fmt: skip


def _name(func: Any) -> str:
    """The name of a function; of an attribute that is read, its own."""
    name = func.__name__
    return func.__self__.__name__ if name == "__get__" else name


def _axis(args: Any, kwargs: Any) -> int | None:
    """The axis along which a function works, if it says."""
    given = kwargs.get("dim", kwargs.get("dims", args[1] if len(args) > 1 else None))
    given = given[0] if isinstance(given, tuple | list) and given else given
    if isinstance(given, int) and given < 0:
        given += args[0].ndim
    return given if isinstance(given, int) else None


def _permuted(func: Any, args: Any, kwargs: Any, axis: int | None) -> int | None:
    """Where a function that permutes the axes of its first argument leaves this one."""
    if axis is None or not args:
        return None
    with torch._C.DisableTorchFunction():
        probe = torch.empty([2 + i for i in range(args[0].ndim)], device="meta")
        return list(func(probe, *args[1:], **kwargs).shape).index(2 + axis)


def _alike(tensor: Tensor, dim: int) -> bool:
    """Whether all slices along an axis are equal."""
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
