"""Rules that say where the rows of a batch are after a function was called.

`place_after` finds the rule; the tables of `gift/bank/kinds.py` say which functions have one.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gift.bank import kinds, products, samples
from gift.bank.call import Call
from gift.bank.indexing import found_in, indexed, is_decision, scattered, written
from gift.bank.places import (
    SAME,
    Lost,
    Mixed,
    One,
    Operand,
    Place,
    Rows,
    aligned,
    entry,
    everywhere,
    placed,
    repeated,
    reshaped,
    sliced,
    stretched,
)
from gift.private.torch.tracing import unfollowed

Rule = Callable[[Call, int], Place]  # of a call and the number of a result


def place_after(call: Call, which: int) -> Place:
    """Return where the rows are in one of a call's results.

    Raises:
        Mixed: if the function mixes rows, or is not known to keep them apart.
    """
    name, read = call.name, _read(call)
    places = [call.place_of(tensor) for tensor in read]
    varying = [place for place in places if place is not SAME]
    for place in varying:
        if isinstance(place, Lost):
            return place
    if not varying:
        return SAME
    first = varying[0]
    if name not in kinds.WRITING and isinstance(first, One) and all(p == first for p in varying):
        return first
    try:
        return _rule(name)(call, which)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise Mixed("is called in a way that is not known to keep rows apart") from None


def _read(call: Call) -> list[Tensor]:
    """Return the tensors on whose values a result depends."""
    if call.name in kinds.READING_FIRST:
        return call.tensors[:1] if call.name not in kinds.WEIGHTED else call.tensors
    if call.name in kinds.MAKING or call.name == "copy":
        return call.tensors[1:]
    if call.name in ("__getitem__", "__setitem__"):
        return [t for t in call.tensors if not (is_decision(t) and _is_lost(call, t))]
    return call.tensors


def _is_lost(call: Call, tensor: Tensor) -> bool:
    return tensor is not call.args[0] and isinstance(call.place_of(tensor), Lost)


@cache
def _rule(name: str) -> Rule:
    """Return the rule for a function, by its name."""
    if name in _OWN:
        return _OWN[name]
    if name in kinds.WEIGHTED:
        return _weighted
    for names, rule in _BY_KIND:
        if name in names:
            return rule
    return _pointwise if kinds.is_pointwise(name) else _unknown


def _unknown(call: Call, which: int) -> Place:
    raise Mixed("is not known to keep rows apart")


def _pointwise(call: Call, which: int) -> Place:
    return call.together(call.tensors, call.made[which].shape)


def _weighted(call: Call, which: int) -> Place:
    place = call.only_first()
    if call.name == "prelu" and place.axis == 1:
        raise Mixed("gets rows in an argument that all rows share")
    return place


def _copied(call: Call, which: int) -> Place:
    return call.together(call.tensors[1:], call.made[which].shape)


def _expanded(call: Call, which: int) -> Place:
    x = call.tensors[which] if call.name == "broadcast_tensors" else call.x
    return call.together([x], call.made[which].shape)


# --- axes that move ------------------------------------------------------------------------------


def _permuted(call: Call, which: int) -> Place:
    place = call.only_first()
    axes = [tuple(a) if isinstance(a, list) else a for a in call.args[1:]]
    named = tuple((n, tuple(a) if isinstance(a, list) else a) for n, a in call.kwargs.items())
    return place.on(_permutation(call.func, call.x.ndim, tuple(axes), named).index(place.axis))


@cache
def _permutation(func: Any, ndim: int, args: Any, kwargs: Any) -> list[int]:
    """Return the axis that each axis of the result was."""
    with unfollowed():
        probe = torch.empty([2 + i for i in range(ndim)], device="meta")
        return [size - 2 for size in func(probe, *args, **dict(kwargs)).shape]


def _reshaped(call: Call, which: int) -> Place:
    x = call.tensors[which] if len(call.made) > 1 else call.x
    place, made = call.place_of(x), call.made[which]
    if not isinstance(place, Rows):
        return place
    if x.numel() == made.numel():
        return reshaped(place, x.shape, made.shape)
    if place.axis == x.ndim - 1:  # another dtype's view
        raise Mixed("cuts rows into pieces that no axis holds")
    return place


def _strided(call: Call, which: int) -> Place:
    place, x, made = call.only_first(), call.x, call.made[which]
    axis = place.axis
    start = (made.storage_offset(), made.shape[axis : axis + 1], made.stride()[axis : axis + 1])
    if start != (x.storage_offset(), x.shape[axis : axis + 1], x.stride()[axis : axis + 1]):
        raise Mixed("reads memory in an order of its own")
    return place


def _diagonal(call: Call, which: int) -> Place:
    place, x = call.only_first(), call.x
    one = call.given(2, "dim1", default=0) % x.ndim
    other = call.given(3, "dim2", default=1) % x.ndim
    if place.axis in (one, other):
        raise Mixed("works along the axis of the rows")
    return place.on(place.axis - (one < place.axis) - (other < place.axis))


def _diagonally(call: Call, which: int) -> Place:
    """The last axis becomes the diagonal of two others; the rest keep their order around these."""
    place, made = call.only_first(), call.made[which]
    one = call.given(2, "dim1", default=-2) % made.ndim
    other = call.given(3, "dim2", default=-1) % made.ndim
    if place.axis == call.x.ndim - 1:
        raise Mixed("works along the axis of the rows")
    return place.on([a for a in range(made.ndim) if a not in (one, other)][place.axis])


# --- axes that grow ------------------------------------------------------------------------------


def _repeated(call: Call, which: int) -> Place:
    place, x, made = call.only_first(), call.x, call.made[which]
    axis = place.axis - x.ndim
    return repeated(place, made.shape[axis] // x.shape[axis]).on(axis + made.ndim)


def _interleaved(call: Call, which: int) -> Place:
    x, repeats = call.x, call.given(1, "repeats")
    place = call.only(x, call.tensors[1:])
    axis = call.given(2, "dim")
    axis = 0 if x.ndim == 1 else axis
    if axis is None:
        raise Mixed("flattens rows")
    if axis % x.ndim != place.axis:
        return place
    if not isinstance(repeats, int):
        return placed(
            call.n, place.axis, everywhere(place, x.shape[axis]).repeat_interleave(repeats.cpu())
        )
    return stretched(place, repeats)


def _joined(call: Call, which: int) -> Place:
    axis, least = kinds.JOINING[call.name]
    parts = [part for part in call.tensors if part.numel() or part.ndim != 1]
    ndim = parts[0].ndim
    if ndim < least:
        raise Mixed("joins tensors of too few axes")
    if call.name in ("cat", "concat", "concatenate"):
        axis = call.given(1, "dim", "axis", default=0)
    return _side_by_side([call.operand(part) for part in parts], axis % ndim, call.n)


def _stacked(call: Call, which: int) -> Place:
    axis = call.given(1, "dim", default=0) % call.made[which].ndim
    parts: list[Operand] = []
    for part in call.tensors:
        shape, place = call.operand(part)
        shape = (*shape[:axis], 1, *shape[axis:])
        if isinstance(place, Rows) and place.axis >= axis:
            place = place.on(place.axis + 1)
        parts.append((shape, place))
    return _side_by_side(parts, axis, call.n)


def _side_by_side(parts: Sequence[Operand], axis: int, n: int) -> Place:
    """Return the place after parts were joined along an axis."""
    along = [isinstance(p, One) or (isinstance(p, Rows) and p.axis == axis) for _, p in parts]
    if not any(along):
        return aligned(
            [(_without(before, axis), place) for before, place in parts],
            _without(parts[0][0], axis),
        )
    if not all(along):
        raise Mixed("joins rows with what is not theirs")
    ids, ragged = [], False
    for shape, place in parts:
        if isinstance(place, One):
            ids.append(torch.full((shape[axis],), place.row))
        else:
            assert isinstance(place, Rows)
            ids.append(everywhere(place, shape[axis]))
            ragged = ragged or place.ragged
    return placed(n, axis, torch.cat(ids), ragged)


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [1 if a == axis else size for a, size in enumerate(shape)]


def _padded(call: Call, which: int) -> Place:
    place = call.only_first()
    pads, there = call.given(1, "pad"), 2 * (call.x.ndim - 1 - place.axis)
    if any(pads[there : there + 2]):
        raise Mixed("adds to the axis of the rows")
    return place


# --- axes along which something happens ----------------------------------------------------------


def _axes(call: Call, ndim: int) -> set[int]:
    """Return the axes along which a function of `kinds.ALONG` works."""
    position, default = kinds.ALONG[call.name]
    given = next((call.kwargs[key] for key in ("dims", "dim", "axis") if key in call.kwargs), None)
    if given is None and len(call.args) > position:
        varargs = call.name == "flip" and isinstance(call.args[1], int)
        given = call.args[position:] if varargs else call.args[position]
    if isinstance(given, bool) or not isinstance(given, int | tuple | list):
        given = range(ndim) if default is None else default
    return {a % ndim for a in ((given,) if isinstance(given, int) else given)}


def _along(call: Call, which: int) -> Place:
    shape = call.made[which].shape
    ndim = max(tensor.ndim for tensor in call.tensors)
    axes = _axes(call, ndim)
    if call.name in ("gather", "take_along_dim") and call.place_of(call.x) is SAME:
        index = call.tensors[1]  # entries of a table are where the index has them
        if index.shape == shape:
            return call.place_of(index)
    widest = [max(t.shape[a] for t in call.tensors if t.ndim >= -a) for a in range(-ndim, 0)]
    place = call.together(call.tensors, widest)
    assert isinstance(place, Rows)  # `place_after` has the other cases
    size = widest[place.axis]
    if place.axis in axes:
        if call.name in kinds.SPLITTING:
            return _piece(call, which, place)
        if call.name in ("flip", "flipud", "fliplr") and not place.ragged:
            return placed(call.n, place.axis, everywhere(place, size).flip(0))
        raise Mixed("works along the axis of the rows")
    gone = ndim - len(shape) == len(axes)
    there = place.on(place.axis - gone * sum(a < place.axis for a in axes))
    if there.axis >= len(shape) or shape[there.axis] != size:
        raise Mixed("takes some of the rows only")
    return there


def _piece(call: Call, which: int, place: Rows) -> Place:
    """Return the place in one of the pieces of a tensor that was cut along the axis of the rows."""
    x, made, axis = call.x, call.made[which], place.axis
    if call.name in ("select", "select_copy"):
        return entry(place, int(call.given(2, "index")), x.shape[axis])
    if call.name in ("unbind", "__iter__"):
        return entry(place, which, x.shape[axis])
    if call.name in ("narrow", "narrow_copy"):
        start = int(call.given(2, "start"))
        start += x.shape[axis] if start < 0 else 0
    else:
        start = sum(piece.shape[axis] for piece in call.made[:which])
    return sliced(place, x.shape[axis], start, start + made.shape[axis])


def _largest(call: Call, which: int) -> Place:
    """`max` and `min` compare two tensors, or reduce one."""
    return _pointwise(call, which) if len(call.tensors) > 1 else _along(call, which)


def _selected(call: Call, which: int) -> Place:
    index = (*[slice(None)] * (call.given(1, "dim") % call.x.ndim), call.given(2, "index"))
    return indexed(call, call.x, call.place_of(call.x), index)


def _got(call: Call, which: int) -> Place:
    return indexed(call, call.args[0], call.place_of(call.args[0]), call.args[1])


def _written(call: Call, which: int) -> Place:
    return written(call, call.args[0])


def _scattered(call: Call, which: int) -> Place:
    return scattered(call, call.args[0])


def _where(call: Call, which: int) -> Place:
    """`where` chooses between tensors, or finds where one holds."""
    if len(call.args) + len(call.kwargs) > 1:
        return _pointwise(call, which)
    return _held(call, which)


def _held(call: Call, which: int) -> Place:
    return found_in(call.only_first(), call.x.nonzero(as_tuple=True))


def _mask_selected(call: Call, which: int) -> Place:
    x, mask = call.tensors[:2]
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    place = call.together([x, mask], shape)
    return found_in(place, mask.expand(shape).nonzero(as_tuple=True))


# --- axes that are mixed -------------------------------------------------------------------------


def _trailing(call: Call, which: int) -> Place:
    place, x, made = call.only_first(), call.x, call.made[which]
    mixed = kinds.TRAILING.get(call.name, 0)
    if call.name in kinds.NORMALISING:
        given = call.given(1, "normalized_shape")
        mixed = 1 if isinstance(given, int) else len(given)
    if place.axis >= x.ndim - mixed or made.shape[place.axis] != x.shape[place.axis]:
        raise Mixed("works along the axis of the rows")
    return place


_OWN: dict[str, Rule] = {
    "as_strided": _strided,
    "diagonal": _diagonal,
    "diag_embed": _diagonally,
    "repeat_interleave": _interleaved,
    "stack": _stacked,
    "pad": _padded,
    "max": _largest,
    "min": _largest,
    "index_select": _selected,
    "__getitem__": _got,
    "where": _where,
    "nonzero": _held,
    "argwhere": _held,
    "masked_select": _mask_selected,
    "copy": _copied,
    "embedding": lambda call, which: call.only_first(),
    "scaled_dot_product_attention": samples.of_matrices,
    "linalg_solve": samples.solved,
    "linalg_solve_triangular": samples.solved,
    "multi_head_attention_forward": samples.attended_by_heads,
    "matmul": products.matmul,
    "__matmul__": products.matmul,
    "__rmatmul__": products.matmul,
    "einsum": products.summed,
    "repeat": _repeated,
    "tile": _repeated,
    "to": lambda call, which: call.together([call.x], call.made[which].shape),
    "type_as": lambda call, which: call.together([call.x], call.made[which].shape),
}
_BY_KIND: tuple[tuple[Any, Rule], ...] = (
    (kinds.PERMUTING, _permuted),
    (kinds.RESHAPING, _reshaped),
    (kinds.EXPANDING, _expanded),
    (kinds.JOINING, _joined),
    (kinds.ALONG, _along),
    (kinds.TRAILING, _trailing),
    (kinds.NORMALISING, _trailing),
    (kinds.BATCHED, samples.batched),
    (kinds.CELLS, samples.cell),
    (kinds.RECURRENT, samples.recurrent),
    (kinds.PRODUCTS, products.product),
    (kinds.ADDED, products.added),
    (kinds.WRITING, _written),
    (kinds.SCATTERING, _scattered),
)
