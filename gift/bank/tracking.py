"""What the rows of a batch become inside a network: which tensors have them, and where."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


class Hook:
    """A hook of a module that does nothing in a copy of the module."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """What `call` gives; of a copy, nothing."""
        return None if self.call is None else self.call(*args)

    def __reduce__(self) -> Any:
        return Hook, ()


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
        self._axes = WeakTensorKeyDictionary()  # of rows, if not `dim`; None is unknown
        self._followed = WeakTensorKeyDictionary()  # what was made of the batch, as was seen
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
        self._followed[tensor] = True

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
            made = [args[0]] if _name(func) == "__setitem__" else list(_tensors(result))
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
        read = {"making": [], "first": given[:1], "other": given[1:2], "last_two": given[-2:]}.get(
            _READS.get(name, ""), given
        )
        varying = [tensor for tensor in read if not self.is_same(tensor)]
        if not varying:
            self._same.update(dict.fromkeys(made, True))
            return
        # Where the rows are is taken from what comes first, before masks and the like, unless it
        # comes from elsewhere.
        first = min(varying, key=lambda tensor: (tensor not in self._followed, not tensor.ndim))
        axis = self._axes.get(first, self.dim)
        moved = [
            self._put(name, args, kwargs, axis)
            if name in _PUTTING
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
        """Where in a result the rows are that were at an axis; None if that is not known."""
        if axis is None or name in _ANYWHERE or axis >= first.ndim:
            return None
        if name in _PERMUTING:
            return _permuted(func, args, kwargs, axis)
        if name == "__getitem__":
            return self._indexed(args[0], args[1], made, axis)
        if name in _COMBINING:
            return _combined(name, args, kwargs, read, first, made, axis)
        if name in _GROWING:  # one batch after the other, which is no batch of these rows
            same = made.ndim == first.ndim and made.shape[axis] == first.shape[axis]
            return axis if same else None
        if name in _BROADCASTING or (name in ("max", "min") and len(read) > 1):
            return None if made.ndim < first.ndim else axis + made.ndim - first.ndim
        if name in _ALONG:
            return _left(name, args, kwargs, first, made, axis)
        unknown = axis != self.dim and (name in _RESHAPING or made.ndim != first.ndim)
        return None if unknown else axis

    def _indexed(self, x: Tensor, index: Any, made: Tensor, axis: int) -> int | None:
        """The same for what is read by an index."""
        if self.is_same(x):  # a table, whose entries are where the index has them
            is_number = isinstance(index, Tensor) and index.dtype != torch.bool
            return axis if is_number else None
        items = _items(index, x.ndim)
        if isinstance(items[0], Tensor) and axis == 0 and len(items) > 1:
            dims = [item.ndim for item in items if isinstance(item, Tensor)]
            # Of each row another place.
            return 0 if max(dims) == 1 and _is_whole(items[0], self.batch) else None
        chosen = [isinstance(item, Tensor | list) for item in items if type(item) is not int]
        first, last = (chosen.index(True), chosen[::-1].index(True)) if any(chosen) else (0, 0)
        if any(chosen) and not all(chosen[first : len(chosen) - last]):
            return None  # what is chosen at places apart comes first
        there, left = 0, axis
        for item in items:
            if item is None:
                there += 1
            elif left == 0:
                return there if _is_whole(item, x.shape[axis]) else None
            elif isinstance(item, Tensor | list):
                return None
            else:
                there, left = there + isinstance(item, slice), left - 1
        return there + left

    def _put(self, name: str, args: Any, kwargs: Any, axis: int | None) -> int | None:
        """Where the rows are in what is put at places that an index says into something else."""

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
            item = _at(_items(index if name == "__setitem__" else tuple(index), into.ndim), axis)
        else:
            along = given(1, "dim")
            item = given(2, "index") if along % into.ndim == axis else slice(None)
        mask = isinstance(item, Tensor) and item.dtype == torch.bool and not self.is_same(item)
        kept = mask or (not varies and not self.is_same(into))
        return axis if kept or _is_whole(item, into.shape[axis]) else None

    def _is_own(self, weight: Tensor) -> bool:
        return any(p is weight for p in self._inside[-1]._parameters.values())


# fmt: off
_PERMUTING = (
    "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "T", "mT", "H",
    "mH", "adjoint", "unsqueeze",
)
_RESHAPING = ("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
_GROWING = (
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack",
    "row_stack", "repeat", "tile",
)
_BROADCASTING = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "floor_divide",
    "rsub", "pow", "where", "maximum", "minimum", "fmod", "remainder", "lerp", "addcmul", "addcdiv",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "expand", "expand_as",
    "broadcast_to",
)
_MULTIPLYING = ("matmul", "__matmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv")
_PUTTING = (
    "__setitem__", "index_put", "index_add", "index_copy", "index_fill", "index_reduce", "scatter",
    "scatter_add", "scatter_reduce",
)
# Whose result has the axes of the first argument only.
_WEIGHTED = (
    "linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "cdist", "outer", "ger",
)
_COMBINING = (*_MULTIPLYING, *_WEIGHTED, "einsum", "pad", "as_strided")
# After which the rows may be anywhere.
_ANYWHERE = (
    "take", "masked_select", "nonzero", "argwhere", "unique", "diagonal", "diag", "tensordot",
    "kron", "block_diag", "cartesian_prod", "combinations", "__rmatmul__",
)
# What mixes, chooses, splits or reduces along axes: which argument these are (9: none), and what
# they are if it is not given (None: all).
_ALONG: dict[str, tuple[int, Any]] = {
    "flip": (1, None), "flipud": (9, 0), "fliplr": (9, 1), "rot90": (2, (0, 1)),
    "roll": (2, None), "fftshift": (1, None), "fft_fftshift": (1, None),
    "ifftshift": (1, None), "fft_ifftshift": (1, None),
    "index_select": (1, None), "gather": (1, None), "take_along_dim": (2, None),
    "sort": (1, -1), "argsort": (1, -1), "msort": (9, 0), "topk": (2, -1), "kthvalue": (2, -1),
    "unbind": (1, 0), "select": (1, None), "__iter__": (9, 0), "squeeze": (1, None),
    "select_scatter": (2, None), "slice_scatter": (2, 0),
    "normalize": (2, 1), "norm": (2, None), "linalg_vector_norm": (2, None),
    "quantile": (2, None), "cosine_similarity": (2, 1),
    **dict.fromkeys(
        ("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split"),
        (2, 0),
    ),
    **dict.fromkeys(("narrow", "narrow_copy", "unfold"), (1, None)),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "softmax", "log_softmax",
         "softmin", "mean", "nanmean", "sum", "nansum", "prod", "amax", "amin", "aminmax", "max",
         "min", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "logsumexp", "all",
         "any", "count_nonzero"), (1, None),
    ),
    **dict.fromkeys(("median", "nanmedian", "mode"), (1, None)),
}
# Whose values come from nowhere, or from some of the tensors only.
_READS = dict.fromkeys(
    ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
     "zeros_like", "ones_like", "full_like", "empty_like"), "making",
) | dict.fromkeys(("to", "type_as", "expand_as", "view_as", "reshape_as"), "first") | {
    "copy": "other", "addmm": "last_two", "baddbmm": "last_two", "addmv": "last_two",
}
# fmt: on


def _name(func: Any) -> str:
    """The name of a function, also of one in place; of an attribute that is read, its own."""
    name: str = func.__name__
    if name == "__get__":
        return str(func.__self__.__name__)
    return name if name.endswith("__") else name.rstrip("_")


def _axes(name: str, args: Any, kwargs: Any, x: Tensor) -> set[int]:
    """The axes along which a function of `_ALONG` works."""
    place, default = _ALONG[name]
    given = next((kwargs[key] for key in ("dims", "dim", "axis") if key in kwargs), None)
    if given is None and len(args) > place:
        given = args[place:] if name == "flip" and isinstance(args[1], int) else args[place]
    if isinstance(given, bool) or not isinstance(given, int | tuple | list):
        given = range(x.ndim) if default is None else default
    return {a % x.ndim for a in ((given,) if isinstance(given, int) else given)}


def _left(name: str, args: Any, kwargs: Any, x: Tensor, made: Tensor, axis: int) -> int | None:
    """Where a function of `_ALONG` leaves another axis than those along which it works."""
    axes = _axes(name, args, kwargs, x)
    if name == "squeeze":
        axes = {a for a in axes if x.shape[a] == 1}
    gone = x.ndim - made.ndim == len(axes)
    return None if axis in axes else axis - gone * sum(a < axis for a in axes)


def _combined(
    name: str, args: Any, kwargs: Any, read: list[Tensor], x: Tensor, made: Tensor, axis: int
) -> int | None:
    """Where a function of `_COMBINING` leaves an axis."""
    if name in _MULTIPLYING:
        return _multiplied(read, x, made, axis)
    if name == "einsum":
        return _summed(args, read, x, axis)
    if name == "pad":
        pads, there = kwargs["pad"] if "pad" in kwargs else args[1], 2 * (x.ndim - 1 - axis)
        return None if any(pads[there : there + 2]) else axis
    if name == "as_strided":
        start = (made.storage_offset(), made.shape[axis : axis + 1], made.stride()[axis : axis + 1])
        same = start == (x.storage_offset(), x.shape[axis : axis + 1], x.stride()[axis : axis + 1])
        return axis if same else None
    summed = name == "linear" and axis == x.ndim - 1
    return None if summed or x is not read[0] else axis  # not the rows of weights


def _items(index: Any, ndim: int) -> tuple[Any, ...]:
    """What an index says of each axis, as far as it does; a mask says it of several."""
    items = index if isinstance(index, tuple) else (index,)
    for i, item in enumerate(items):
        if item is Ellipsis:
            more = ndim - sum(map(_width, items))
            return (*items[:i], *[slice(None)] * more, *items[i + 1 :])
    return items


def _width(item: Any) -> int:
    """How many axes an item of an index stands for."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _at(items: tuple[Any, ...], axis: int) -> Any:
    """What an index says of an axis."""
    for item in items:
        if axis < _width(item):
            return item
        axis -= _width(item)
    return slice(None)


def _is_whole(item: Any, size: int) -> bool:
    """Whether an item of an index stands for everything there, in order."""
    if isinstance(item, slice):
        return item.indices(size) == (0, size, 1)
    if isinstance(item, Tensor) and item.dtype != torch.bool:
        return torch.equal(item, torch.arange(size, device=item.device).to(item.dtype))
    return False


def _multiplied(factors: list[Tensor], x: Tensor, made: Tensor, axis: int) -> int | None:
    """Where a product of matrices has an axis of one of them; None if it is summed over."""
    left, right = factors[:2]
    if axis == (x.ndim - 1 if x is left else max(x.ndim - 2, 0)):
        return None
    ndim = made.ndim + (left.ndim == 1) + (right.ndim == 1)
    return axis + ndim - x.ndim - (left.ndim == 1 and axis == x.ndim - 1)


def _summed(args: Any, factors: list[Tensor], x: Tensor, axis: int) -> int | None:
    """The same for einsum."""
    if not isinstance(args[0], str) or "->" not in args[0]:
        return None
    terms, result = args[0].replace(" ", "").split("->")
    rests = {  # the axes that dots stand for, counted from the last
        i: "9876543210"[10 - factor.ndim + len(term.replace("...", "")) :]
        for i, (term, factor) in enumerate(zip(terms.split(","), factors, strict=True))
    }
    which = next(i for i, factor in enumerate(factors) if factor is x)
    name = terms.split(",")[which].replace("...", rests[which])[axis]
    found = result.replace("...", max(rests.values(), key=len)).find(name)
    return None if found < 0 else found


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
