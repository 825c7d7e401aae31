"""Where the rows are after a tensor was indexed, and after values were written at an index."""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gift.bank.call import Call
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
    placed_in,
    sliced,
)

Index = tuple[Tensor, Place]  # positions along one axis, and where their own rows are


MASKS = (torch.bool, torch.uint8)


def is_decision(index: Any) -> bool:
    """Whether an item of an index is one number in a tensor, which is read as a Python number."""
    return isinstance(index, Tensor) and index.numel() == 1 and not index.is_floating_point()


def indexed(call: Call, x: Tensor, place: Place, index: Any) -> Place:
    """Return the place in `x[index]` if the rows of `x` are at a place."""
    result: Place = place if isinstance(place, One) else SAME
    layout: list[Any] = []  # axes of the result: an axis of `x`, None if new, "chosen" if joint
    chosen: list[tuple[int, Index]] = []
    axis = 0
    for item in (*_items(index, x.ndim), *[slice(None)] * x.ndim):
        if item is None:
            layout.append(None)
            continue
        if axis == x.ndim:
            break
        if not isinstance(item, slice) and not _is_number(item):
            found = [(axis + i, one) for i, one in enumerate(_positions(call, item))]
            chosen += found
            layout += ["chosen"] * len(found)
            axis += len(found)
            continue
        if isinstance(place, Rows) and axis == place.axis:
            result = _at_rows(place, item, x.shape[axis])
        layout += [axis] if isinstance(item, slice) else []
        axis += 1
    joint = _chosen(x, place, chosen)
    if joint is SAME:
        return (
            result.on(_where(layout, result.axis, chosen)) if isinstance(result, Rows) else result
        )
    if result is not SAME and result != joint:
        raise Mixed("picks other entries for each row")
    return joint.on(joint.axis + _start(layout)) if isinstance(joint, Rows) else joint


def _at_rows(place: Rows, item: Any, size: int) -> Place:
    """Return the place after a slice or a number along the axis of the rows."""
    if isinstance(item, slice):
        return sliced(place, size, *item.indices(size))
    return entry(place, int(item), size)


def _is_number(item: Any) -> bool:
    return item.ndim == 0 if isinstance(item, Tensor) else isinstance(item, Integral)


def _is_bool(item: Any) -> bool:
    """Whether an item is True or False, also as a scalar of numpy or torch."""
    if isinstance(item, Tensor):
        return item.ndim == 0 and item.dtype in MASKS
    return isinstance(item, bool) or (str(getattr(item, "dtype", "")) == "bool" and not item.ndim)


def _items(index: Any, ndim: int) -> tuple[Any, ...]:
    """Return the items of an index, with dots expanded."""
    items = index if isinstance(index, tuple) else (index,)
    if any(map(_is_bool, items)):
        raise Mixed("is indexed by a bool")
    for i, item in enumerate(items):
        if item is Ellipsis:
            more = ndim - sum(map(_width, items))
            return (*items[:i], *[slice(None)] * more, *items[i + 1 :])
    return items


def _width(item: Any) -> int:
    """Return the number of axes that an item of an index covers."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, slice) or _is_number(item):
        return 1
    positions = torch.as_tensor(item)
    return positions.ndim if positions.dtype in MASKS else 1


def _positions(call: Call, item: Any) -> Iterator[Index]:
    """Return the positions that a tensor, a list, a tuple or an array picks along one axis.

    A mask picks them along as many axes as it has.
    """
    if not isinstance(item, Tensor):
        item = torch.as_tensor(item)
        place: Place = SAME
    else:
        place = call.place_of(item)
        place = SAME if isinstance(place, Lost) and is_decision(item) else place
    if item.dtype not in MASKS:
        yield item, place
        return
    places = item.nonzero(as_tuple=True)
    for positions in places:
        yield positions, found_in(place, places)


def found_in(mask: Place, places: tuple[Tensor, ...]) -> Place:
    """Return the place in the positions where a mask holds."""
    if not isinstance(mask, Rows):
        return mask
    return Rows(mask.n, 0, ids=mask.of(places[mask.axis]), ragged=True)


def _chosen(x: Tensor, place: Place, chosen: list[tuple[int, Index]]) -> Place:
    """Return the place in the joint axes of tensors of positions."""
    if not chosen:
        return SAME
    shape = torch.broadcast_shapes(*(positions.shape for _, (positions, _) in chosen))
    operands: list[Operand] = [(positions.shape, there) for _, (positions, there) in chosen]
    own = aligned(operands, shape)
    at_rows = [one for axis, one in chosen if isinstance(place, Rows) and axis == place.axis]
    if not at_rows or not isinstance(place, Rows):
        if isinstance(place, Rows) and own is not SAME:
            raise Mixed("picks other entries for each row")
        return own
    positions, _ = at_rows[0]
    if place.ragged and own is SAME:
        raise Mixed("picks entries whose positions depend on other rows")
    ids = place.of((positions % x.shape[place.axis]).expand(shape))
    if isinstance(own, Rows):
        each = everywhere(own, shape[own.axis])
        if not torch.equal(ids, _along(each, own.axis, len(shape)).expand(shape)):
            raise Mixed("picks entries of other rows")
        return own
    return placed_in(place.n, ids, place.ragged)


def _along(ids: Tensor, axis: int, ndim: int) -> Tensor:
    return ids.view([-1 if a == axis else 1 for a in range(ndim)])


def _start(layout: list[Any]) -> int:
    """Return the first joint axis in the result; it is 0 if the tensors are apart."""
    first = layout.index("chosen")
    last = len(layout) - layout[::-1].index("chosen")
    return first if last - first == layout.count("chosen") else 0


def _where(layout: list[Any], axis: int, chosen: list[tuple[int, Index]]) -> int:
    """Return the axis of the result that an axis of the indexed tensor became."""
    place = layout.index(axis)
    if not chosen:
        return place
    joint = len(torch.broadcast_shapes(*(positions.shape for _, (positions, _) in chosen)))
    before = sum(item != "chosen" for item in layout[:place])
    return before + (joint if _start(layout) < place or _start(layout) == 0 else 0)


def written(call: Call, into: Tensor) -> Place:
    """Return the place in a tensor after values were written at an index."""
    index, source = _written_where(call)
    values = call.operand(source) if isinstance(source, Tensor) else ((), SAME)
    place = call.place_of(into)
    if place is not SAME:
        _check_written(call, into, place, index, values)
        return place
    for axis, size in enumerate(into.shape):  # all was the same: any layout is right until now
        if size and size % call.n == 0:
            candidate = Rows(call.n, axis, size // call.n)
            try:
                _check_written(call, into, candidate, index, values)
            except Mixed:
                continue
            return candidate
    if isinstance(values[1], One) and not index_varies(call, index):
        return values[1]
    raise Mixed("writes rows where they cannot be told apart")


def index_varies(call: Call, index: Any) -> bool:
    """Whether a tensor in an index is not the same for all rows."""
    items = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, Tensor) and call.place_of(i) is not SAME for i in items)


def _check_written(call: Call, into: Tensor, place: Place, index: Any, values: Operand) -> None:
    """Raise if values at an index belong to other rows than what is there."""
    there = indexed(call, into, place, index)
    if values[1] is SAME and not (isinstance(there, Rows) and there.ragged):
        return
    shape = into[index].shape if isinstance(there, Rows) else values[0]
    if isinstance(there, Rows):
        aligned([(shape, there), values], shape)
    elif there != values[1]:
        raise Mixed("writes rows over other rows")


def _written_where(call: Call) -> tuple[Any, Any]:
    """Return the index at which a function writes, and what it writes."""
    if call.name == "__setitem__":
        return call.given(1, "indices"), call.given(2, "values")
    if call.name == "index_put":
        return tuple(call.given(1, "indices")), call.given(2, "values")
    x = call.x
    if call.name == "slice_scatter":
        dim = call.given(2, "dim", default=0)
        ends = (call.given(p, n) for p, n in ((3, "start"), (4, "end"), (5, "step")))
        return _at(dim % x.ndim, slice(*ends)), call.given(1, "src")
    if call.name == "select_scatter":
        return _at(call.given(2, "dim") % x.ndim, call.given(3, "index")), call.given(1, "src")
    dim, index = call.given(1, "dim") % x.ndim, call.given(2, "index")
    return _at(dim, index), call.given(3, "src", "source", "value", "tensor")


def _at(dim: int, item: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * dim, item)


def scattered(call: Call, into: Tensor) -> Place:
    """Return the place after values were scattered along one axis, which has no rows."""
    dim, index = call.given(1, "dim") % into.ndim, call.given(2, "index")
    source = call.given(3, "src", "value")
    tensors = [index, *([source] if isinstance(source, Tensor) else [])]
    for tensor in tensors:
        place = call.place_of(tensor)
        if not isinstance(place, Rows) or (axis := place.axis) == dim:
            continue
        if tensor.shape[axis] != into.shape[axis] or index.ndim != into.ndim:
            raise Mixed("scatters some of the rows")
    shape = [1 if a == dim else size for a, size in enumerate(into.shape)]
    operands = [
        ([1 if a == dim else into.shape[a] for a in range(t.ndim)], call.place_of(t))
        for t in tensors
        if t.ndim == into.ndim
    ]
    place = call.place_of(into)
    found = aligned([*operands, (shape, place)], shape)
    if isinstance(found, Rows) and found.axis == dim:
        raise Mixed("works along the axis of the rows")
    return found
