"""Which cells of the matrix run: a selection that covers all pairs, or with GIFT_MATRIX=whole all.

The matrix is methods x layer types x properties. A mistake in it shows in a pair nearly always: a
method that a layer type breaks, a layer type that breaks a property. So of the whole product every
`STEP`-th cell along each axis is enough for ``make test``, in which each pair of a method and a
layer type, of a method and a property, and of a layer type and a property has cells. The lane
``matrix`` runs the whole product, and so does whoever changes a method, for that method.
"""

import os
from collections.abc import Sequence
from typing import Any

STEP = 4
WHOLE = os.environ.get("GIFT_MATRIX") == "whole"


def is_selected(method: int, layer: int, prop: int) -> bool:
    """Whether a cell, given by its places along the axes, is one of those that cover all pairs.

    Any two places leave one residue for the third, so that each `STEP` successive places have a
    cell, whichever two are given.
    """
    return (method + layer + prop) % STEP == 0


def selected(cells: Sequence[tuple[int, int, Any]], prop: int) -> list[Any]:
    """The cells in which a property is tested.

    Args:
        cells: places of method and layer type, and what is tested there.
        prop: the place of the property.
    """
    return [cell for i, j, cell in cells if WHOLE or is_selected(i, j, prop)]
