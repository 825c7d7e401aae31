"""Where the rows of a batch are in a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


class Mixed(Exception):
    """A function mixes rows, or may do so; the message completes "torch.f ..."."""


class Place:
    """Where the rows are in a tensor."""


class Same(Place):
    """All of a tensor is the same for all rows."""


@dataclass(frozen=True)
class Lost(Place):
    """It is not known where the rows are.

    Args:
        why: which function of which module mixed them.
    """

    why: str


@dataclass(frozen=True)
class One(Place):
    """All of a tensor belongs to one row."""

    row: int


@dataclass(eq=False, slots=True)
class Rows(Place):
    """Each entry along an axis belongs to a row.

    Args:
        n: number of rows.
        axis: the axis.
        inner: entry `i` belongs to row `i // inner % n`, unless `ids` says otherwise.
        ids: the row of each entry, on the CPU.
        ragged: whether the data of a row decide how many entries it has. The position of an entry
            then depends on other rows.
    """

    n: int
    axis: int
    inner: int = 1
    ids: Tensor | None = None
    ragged: bool = False

    def on(self, axis: int) -> "Rows":
        """Return the same rows along another axis."""
        if axis == self.axis:
            return self
        return Rows(self.n, axis, self.inner, self.ids, self.ragged)

    def of(self, positions: Tensor) -> Tensor:
        """Return the row of each position along the axis."""
        positions = positions.cpu()
        return positions // self.inner % self.n if self.ids is None else self.ids[positions]

    def agrees(self, other: "Rows") -> bool:
        """Return whether two axes of the same length have the same rows at each position."""
        if self.ids is None or other.ids is None:
            return self.ids is other.ids and self.inner == other.inner
        same = self.ids is other.ids or torch.equal(self.ids, other.ids)
        return same and self.ragged == other.ragged


SAME = Same()


def placed(n: int, axis: int, ids: Tensor, ragged: bool = False) -> Place:
    """Return the place whose entries along an axis belong to these rows."""
    size = len(ids)
    if not size or ragged:
        return Rows(n, axis, ids=ids, ragged=ragged)
    first = int(ids[0])
    others = (ids != first).nonzero()
    if not len(others):
        return One(first)
    inner = int(others[0])
    regular = size % (inner * n) == 0 and torch.equal(ids, torch.arange(size) // inner % n)
    return Rows(n, axis, inner) if regular else Rows(n, axis, ids=ids)


def placed_in(n: int, ids: Tensor, ragged: bool) -> Place:
    """The same for a tensor of rows, which must differ along one axis only."""
    if not ids.numel():
        return placed(n, 0, ids.flatten(), ragged)
    for axis in range(ids.ndim):
        along = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
        if bool((along == along[:, :1]).all()):
            return placed(n, axis, along[:, 0], ragged)
    raise Mixed("cuts rows into pieces that no axis holds")


def everywhere(place: Rows, size: int) -> Tensor:
    """Return the row of each entry along the axis."""
    return place.of(torch.arange(size)) if place.ids is None else place.ids


def picked(place: Rows, positions: Tensor) -> Place:
    """Return the place after some positions along the axis were picked, the axis kept."""
    if place.ragged:
        raise Mixed("picks entries whose positions depend on other rows")
    return placed(place.n, place.axis, place.of(positions))


def sliced(place: Rows, size: int, start: int, stop: int, step: int = 1) -> Place:
    """The same for a slice."""
    whole = (start, stop, step) == (0, size, 1)
    return place if whole else picked(place, torch.arange(start, stop, step))


def entry(place: Rows, index: int, size: int) -> Place:
    """Return the place in one entry along the axis."""
    if place.ragged:
        raise Mixed("picks an entry whose position depends on other rows")
    return One(int(place.of(torch.tensor(index % size))))


def repeated(place: Rows, times: int) -> Rows:
    """Return the place after the axis was repeated as a whole."""
    if times == 1 or place.ids is None:
        return place
    if place.ragged:
        raise Mixed("repeats rows of different lengths")
    return replace(place, ids=place.ids.repeat(times))


def stretched(place: Rows, times: int) -> Rows:
    """Return the place after each entry was repeated beside itself."""
    if place.ids is not None:
        return replace(place, ids=place.ids.repeat_interleave(times))
    return replace(place, inner=place.inner * times)


def reshaped(place: Rows, before: Sequence[int], after: Sequence[int]) -> Rows:
    """Return the place after a reshape, which keeps the order of all elements."""
    a, size = place.axis, before[place.axis]
    for b, new in enumerate(after):
        if prod(after[:b]) == prod(before[:a]) and new == size != 1:
            return place.on(b)
    if place.ids is None:
        span = place.inner * prod(before[a + 1 :])  # elements until the next row
        for b, new in enumerate(after):
            inner, rest = divmod(span, max(prod(after[b + 1 :]), 1))
            if not rest and inner and new and new % (inner * place.n) == 0:
                return Rows(place.n, b, inner)
    else:
        for b, new in enumerate(after):
            aligned = prod(after[:b]) == prod(before[:a]) and size
            if aligned and new % size == 0:
                return stretched(place, new // size).on(b)
            if aligned and new and size % new == 0:
                parts = place.ids.view(new, -1)
                if bool((parts == parts[:, :1]).all()):
                    return replace(place, axis=b, ids=parts[:, 0])
    raise Mixed("cuts rows into pieces that no axis holds")


Operand = tuple[Sequence[int], Place]


def aligned(operands: Sequence[Operand], shape: Sequence[int]) -> Place:
    """Return the place in a result to which operands of these shapes and places are broadcast."""
    found: Rows | None = None
    axis, ones = 0, {place.row for _, place in operands if isinstance(place, One)}
    for before, place in operands:
        if not isinstance(place, Rows):
            continue
        there = place.axis - len(before)
        if found is None:
            found, axis = place, there
        elif there != axis or not found.agrees(place):
            raise Mixed("combines tensors whose rows are along different axes or in another order")
        if shape[there] != before[there]:
            raise Mixed("spreads one row over others")
    if found is None:
        if len(ones) > 1:
            raise Mixed("combines different rows")
        return One(ones.pop()) if ones else SAME
    if ones:
        raise Mixed("combines one row with others")
    if found.ragged and any(p is SAME and _long(before, axis) for before, p in operands):
        raise Mixed("combines rows of different lengths with values for each position")
    return found.on(axis + len(shape))


def _long(shape: Sequence[int], axis: int) -> bool:
    """Whether a tensor has values for each position along an axis."""
    return len(shape) >= -axis and shape[axis] != 1


def in_order(place: Place) -> bool:
    """Return whether entries of rows come in the order of the rows."""
    if not isinstance(place, Rows) or place.ids is None:
        return True
    return bool((place.ids.diff() >= 0).all())


def is_alike(one: Place, other: Place) -> bool:
    """Return whether two places in one tensor are the same."""
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.axis == other.axis and one.agrees(other)
    return one == other
