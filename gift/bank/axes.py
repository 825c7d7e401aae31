"""What functions of torch do to one axis of their first argument."""

from typing import Any

import torch
from torch import Tensor

from gift.private.torch import unfollowed

# fmt: off
PERMUTING = (
    "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "T", "mT", "H",
    "mH", "adjoint", "unsqueeze",
)
RESHAPING = ("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
GROWING = (
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack",
    "row_stack", "repeat", "tile",
)
BROADCASTING = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "floor_divide",
    "rsub", "pow", "where", "maximum", "minimum", "fmod", "remainder", "lerp", "addcmul", "addcdiv",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "expand", "expand_as",
    "broadcast_to",
)
_MULTIPLYING = ("matmul", "__matmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv")
PUTTING = (
    "__setitem__", "index_put", "index_add", "index_copy", "index_fill", "index_reduce", "scatter",
    "scatter_add", "scatter_reduce",
)
# Functions whose result has axes of the first argument only.
_WEIGHTED = (
    "linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "cdist", "outer", "ger",
)
COMBINING = (*_MULTIPLYING, *_WEIGHTED, "einsum", "pad", "as_strided")
# Functions after which the rows may be anywhere.
ANYWHERE = (
    "take", "masked_select", "nonzero", "argwhere", "unique", "diagonal", "diag", "tensordot",
    "kron", "block_diag", "cartesian_prod", "combinations", "__rmatmul__",
)
# Functions that mix, choose, split or reduce along axes: which argument holds the axes (9: none),
# and their default (None: all).
ALONG: dict[str, tuple[int, Any]] = {
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
# Functions whose values depend on no tensor, or on some of the tensors only.
READS = dict.fromkeys(
    ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
     "zeros_like", "ones_like", "full_like", "empty_like"), "making",
) | dict.fromkeys(("to", "type_as", "expand_as", "view_as", "reshape_as"), "first") | {
    "copy": "other", "addmm": "last_two", "baddbmm": "last_two", "addmv": "last_two",
}
# fmt: on


def name_of(func: Any) -> str:
    """Return a function's name without a trailing underscore; for an attribute, its name."""
    name: str = func.__name__
    if name == "__get__":
        return str(func.__self__.__name__)
    return name if name.endswith("__") else name.rstrip("_")


def _axes(name: str, args: Any, kwargs: Any, x: Tensor) -> set[int]:
    """Return the axes along which a function of `ALONG` works."""
    place, default = ALONG[name]
    given = next((kwargs[key] for key in ("dims", "dim", "axis") if key in kwargs), None)
    if given is None and len(args) > place:
        given = args[place:] if name == "flip" and isinstance(args[1], int) else args[place]
    if isinstance(given, bool) or not isinstance(given, int | tuple | list):
        given = range(x.ndim) if default is None else default
    return {a % x.ndim for a in ((given,) if isinstance(given, int) else given)}


def left_by(name: str, args: Any, kwargs: Any, x: Tensor, made: Tensor, axis: int) -> int | None:
    """Return where a function of `ALONG` moves an axis along which it does not work."""
    axes = _axes(name, args, kwargs, x)
    if name == "squeeze":
        axes = {a for a in axes if x.shape[a] == 1}
    gone = x.ndim - made.ndim == len(axes)
    return None if axis in axes else axis - gone * sum(a < axis for a in axes)


def combined(
    name: str, args: Any, kwargs: Any, read: list[Tensor], x: Tensor, made: Tensor, axis: int
) -> int | None:
    """Return where a function of `COMBINING` moves an axis."""
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
    return None if summed or x is not read[0] else axis  # rows of weights are not the batch's


def items_of(index: Any, ndim: int) -> tuple[Any, ...]:
    """Return the items of an index, with dots expanded; a mask covers several axes."""
    items = index if isinstance(index, tuple) else (index,)
    for i, item in enumerate(items):
        if item is Ellipsis:
            more = ndim - sum(map(_width, items))
            return (*items[:i], *[slice(None)] * more, *items[i + 1 :])
    return items


def _width(item: Any) -> int:
    """Return the number of axes that an item of an index covers."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def at(items: tuple[Any, ...], axis: int) -> Any:
    """Return the item of an index for an axis."""
    for item in items:
        if axis < _width(item):
            return item
        axis -= _width(item)
    return slice(None)


def is_whole(item: Any, size: int) -> bool:
    """Whether an item of an index selects everything along an axis, in order."""
    if isinstance(item, slice):
        return item.indices(size) == (0, size, 1)
    if isinstance(item, Tensor) and item.dtype != torch.bool:
        return torch.equal(item, torch.arange(size, device=item.device).to(item.dtype))
    return False


def _multiplied(factors: list[Tensor], x: Tensor, made: Tensor, axis: int) -> int | None:
    """Return where a matrix product moves an axis of a factor; None if it is summed over."""
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


def permuted(func: Any, args: Any, kwargs: Any, axis: int | None) -> int | None:
    """Return where a function that permutes the axes of its first argument moves an axis."""
    if axis is None or not args:
        return None
    with unfollowed():
        probe = torch.empty([2 + i for i in range(args[0].ndim)], device="meta")
        return list(func(probe, *args[1:], **kwargs).shape).index(2 + axis)
