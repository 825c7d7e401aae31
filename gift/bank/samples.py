"""Where the rows are after functions of samples: the batch is an axis that they expect."""

from collections.abc import Sequence

from torch import Tensor

from gift.bank import kinds
from gift.bank.call import Call, tensors_of
from gift.bank.places import SAME, Mixed, Operand, Place, Rows, aligned


def batched(call: Call, which: int) -> Place:
    """Return the place after a function of samples, of which the batch is the first axis."""
    ndim, x = kinds.BATCHED[call.name], call.x
    if call.name == "batch_norm" and call.given(5, "training", default=False):
        raise Mixed("takes statistics over the batch, as in training")
    if ndim is not None and x.ndim != ndim:
        raise Mixed("gets no batch along the first axis")
    return _lengthwise(
        call, [(t, 0) for t in call.tensors[: kinds.SAMPLES.get(call.name, 1)]], 0, which
    )


def _lengthwise(call: Call, given: Sequence[tuple[Tensor, int]], axis: int, which: int) -> Place:
    """Return the place along an axis if tensors have rows along axes that belong together.

    Args:
        call: the call.
        given: tensors and the axis of each; others are the same for all rows.
        axis: the same axis in the result.
        which: number of the result.
    """
    known = {id(tensor) for tensor, _ in given}
    if any(call.place_of(t) is not SAME for t in call.tensors if id(t) not in known):
        raise Mixed("gets rows in an argument that all rows share")
    size = call.made[which].shape[axis]
    operands: list[Operand] = []
    for tensor, a in given:
        place = call.place_of(tensor)
        if isinstance(place, Rows) and place.axis != a:
            raise Mixed("works along the axis of the rows")
        moved = place.on(0) if isinstance(place, Rows) else place
        operands.append(((tensor.shape[a],) if tensor.ndim > a else (), moved))
    place = aligned(operands, (size,))
    return place.on(axis) if isinstance(place, Rows) else place


def recurrent(call: Call, which: int) -> Place:
    """Return the place in outputs or states of a recurrent layer."""
    if not isinstance(call.args[3], bool):
        raise Mixed("gets a packed sequence")
    axis = 0 if call.args[8] else 1
    states = [(state, 1) for state in tensors_of(call.args[1])]
    return _lengthwise(call, [(call.x, axis), *states], 1 if which else axis, which)


def cell(call: Call, which: int) -> Place:
    """Return the place in the states of a recurrent cell."""
    states = [(state, 0) for state in tensors_of(call.args[1])]
    return _lengthwise(call, [(call.x, 0), *states], 0, which)


def of_matrices(call: Call, which: int) -> Place:
    """Return the place after a function of matrices, in the last two axes of each tensor."""
    operands: list[Operand] = []
    for tensor in call.tensors:
        place = call.place_of(tensor)
        if isinstance(place, Rows) and place.axis >= tensor.ndim - 2:
            raise Mixed("works along the axis of the rows")
        operands.append((tensor.shape[:-2], place))
    return aligned(operands, call.made[which].shape[:-2])


def solved(call: Call, which: int) -> Place:
    """Return the place in the solution of systems of equations."""
    if len({tensor.ndim for tensor in call.tensors}) > 1:
        raise Mixed("gets vectors, which may be columns of one matrix")
    return of_matrices(call, which)


def attended_by_heads(call: Call, which: int) -> Place:
    """Return the place in outputs or weights of attention with several heads."""
    if call.x.ndim != 3:
        raise Mixed("gets no batch along the second axis")
    given = [(tensor, 1) for tensor in call.args[:3]]
    if isinstance(call.kwargs.get("key_padding_mask"), Tensor):
        given.append((call.kwargs["key_padding_mask"], 0))
    return _lengthwise(call, given, 0 if which else 1, which)
