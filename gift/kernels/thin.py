"""Products of a factor of a delta with all rows of a linear layer's inputs or outputs.

What lies between the factors is `hidden`: ``right x``, or its gradient. It is ``(rows, rank)``, or
in parts ``(parts, rows of a part, rank)``.

Up to the rank `THIN` the factor comes first in a product, as the other order takes up to twice as
long there, and on a CPU one product for each part is up to twice as fast as one for all. With a
larger rank the rows come first, which takes 0.4 to 1.0 of the time: see `benchmarks/thin.py`.
"""

from torch import Tensor

from gift.kernels.products import outer, product, rows_of
from gift.private.torch.tracing import is_known

THIN = 8
MANY = 1024  # number of rows from which they are computed in parts


def times(right: Tensor, x: Tensor) -> Tensor:
    """Return ``right x`` for each row of `x`, ``(..., inputs)``."""
    if right.shape[0] > THIN:
        return rows_of(x) @ right.mT
    return product(right, _columns(x)).mT


def back(left: Tensor, g: Tensor) -> Tensor:
    """Return ``left^T g`` for each row of `g`, ``(..., outputs)``."""
    if left.shape[1] > THIN:
        return rows_of(g) @ left
    return product(left.mT.contiguous(), _columns(g)).mT


def of_left(hidden: Tensor, g: Tensor) -> Tensor:
    """Return the gradient of `left`: the sum of ``g hidden^T`` over all rows of `g`."""
    if hidden.shape[-1] > THIN:
        rows = rows_of(g)
        if not is_known(rows.shape[0] >= MANY):
            return rows.mT @ hidden
        return (hidden.mT @ rows).mT.contiguous()
    columns = _columns(g)
    if hidden.dim() > columns.dim():  # saved in parts, and compiled since
        hidden = hidden.flatten(0, 1)
    return outer(hidden.mT, columns).mT.contiguous()


def of_right(hidden: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of `right`: the sum of ``hidden x^T`` over all rows of `x`."""
    return hidden.mT @ rows_of(x) if hidden.shape[-1] > THIN else outer(hidden.mT, _columns(x))


def add(y: Tensor, hidden: Tensor, factor: Tensor, scale: float = 1) -> None:
    """Add ``scale hidden factor`` to the rows of `y`, which is contiguous, in place."""
    # Not `y.mT.addmm_(factor.mT, hidden.mT)`: torch 2.14 compiles that to something else.
    y.view(-1, y.shape[-1]).addmm_(rows_of(hidden), factor, alpha=scale)


def _columns(x: Tensor) -> Tensor:
    """Return `x` as ``(features, rows)``, or in parts, without a copy if it is contiguous."""
    features = x.shape[-1]
    rows = x.numel() // max(1, features)
    parts = 1
    if x.device.type == "cpu" and is_known(rows >= MANY):
        parts = next(n for n in (8, 4, 2, 1) if is_known(rows % n == 0))
    if parts == 1:
        return x.reshape(rows, features).mT
    return x.reshape(parts, rows // parts, features).mT
