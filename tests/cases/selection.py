"""Which cells of a product run: a selection that covers all pairs, or with GIFT_MATRIX=whole all.

The matrix is methods x layer types x properties. A mistake in it shows in a pair nearly always: a
method that a layer type breaks, a layer type that breaks a property. So of the whole product every
`STEP`-th cell along each axis is enough for ``make test``, in which each pair of a method and a
layer type, of a method and a property, and of a layer type and a property has cells. The lane
``matrix`` runs the whole product, and so does whoever changes a method, for that method. `cells`
selects from other products in the same way: quantised weights, compiled layers, sums of deltas.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

STEP = 6
WHOLE = os.environ.get("GIFT_MATRIX") == "whole"


def is_selected(places: Iterable[int], step: int = STEP) -> bool:
    """Whether a cell, given by its places along the axes, is one of those that run.

    All places but one leave one residue for the other, so that each `step` successive places along
    an axis have a cell, whatever the places along the others are.
    """
    return WHOLE or sum(places) % step == 0


def selected(cells: Sequence[tuple[int, int, Any]], prop: int, step: int = STEP) -> list[Any]:
    """The cells in which a property is tested.

    Args:
        cells: places of method and layer type, and what is tested there.
        prop: the place of the property.
        step: the larger, the fewer cells run.
    """
    return [cell for i, j, cell in cells if is_selected((i, j, prop), step)]


def cells(step: int = STEP, **axes: Mapping[str, Any] | Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by a product, of which every `step`-th cell along each axis runs.

    Args:
        step: the larger, the fewer cells run; short axes make it smaller, so that each value runs.
        axes: the values of each argument of the test, by their names in its identity; or values
            that are their own names.
    """
    values = [
        [*axis.items()] if isinstance(axis, Mapping) else [(str(value), value) for value in axis]
        for axis in axes.values()
    ]
    ways = sum(len(axis) - 1 for axis in values)
    step = min(step, *(1 + ways - (len(axis) - 1) for axis in values))
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(*(value for _, (_, value) in cell), id="-".join(n for _, (n, _) in cell))
            for cell in itertools.product(*map(enumerate, values))
            if is_selected((place for place, _ in cell), step)
        ],
    )
