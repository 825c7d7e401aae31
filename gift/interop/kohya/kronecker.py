"""Kronecker products in kohya files: which LyCORIS has, and how others are written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gift.interop.factors import Pair, product, smallest
from gift.methods.lokr import factorization


def is_split_of_lycoris(
    outputs: int, inputs: int, first: tuple[int, int], columns: int, values: Mapping[str, Tensor]
) -> bool:
    """Whether LyCORIS finds the split of a matrix from the shapes of the two factors.

    It guesses one `factor` for rows and inputs, with the kernel beside the inputs where the second
    factor is itself a product, and refuses a file whose factors are not those of its guess.

    Args:
        outputs: rows of the matrix.
        inputs: input channels of the layer, in a group.
        first: shape of the first factor.
        columns: inputs times kernel.
        values: LoKr's parameters.
    """
    a, c = first
    if inputs % c:
        return False
    seen = inputs if "lokr_w2" in values else columns
    rows, of_columns = (a, outputs // a), (c, seen // c)
    sides = [max(a, c), max(rows[1], of_columns[1])]
    fitting = [side for side in sides if side in rows and side in of_columns]
    guess = [*fitting, min(sides)][0]
    if a == factorization(outputs, -1)[0] and c == factorization(seen, -1)[0]:
        guess = -1
    return (factorization(outputs, guess), factorization(inputs, guess)) == (rows, (c, inputs // c))


def joined(values: Mapping[str, Tensor]) -> Pair:
    """Return two factors of the whole product, which may be one for each group.

    The product of ``U V`` and ``P Q`` is that of `U` and `P` times that of `V` and `Q`.
    """
    (u, v), (p, q) = (_factors(values, name) for name in ("lokr_w1", "lokr_w2"))
    return _kronecker(u, p), _kronecker(v, q)


def _factors(values: Mapping[str, Tensor], name: str) -> Pair:
    """Return two factors of one of the two matrices, of the smallest rank that any may need."""
    if name not in values:
        return smallest(values[f"{name}_a"], values[f"{name}_b"])
    whole = values[name]
    size = whole.shape[-1]
    return smallest(whole, torch.eye(size, dtype=whole.dtype).expand(*whole.shape[:-2], size, size))


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    found = left[..., :, None, :, None] * right[..., None, :, None, :]
    return found.flatten(-4, -3).flatten(-2)


def as_one(factors: Pair, full: bool) -> dict[str, Tensor]:
    """Return LoKr whose first factor is one number.

    Args:
        factors: of the whole delta.
        full: whether the second factor is the delta itself, not these.
    """
    left, right = factors
    one = {"lokr_w1": torch.ones(1, 1, dtype=left.dtype)}
    if full:
        return one | {"lokr_w2": product(left, right)}
    return one | {"lokr_w2_a": left, "lokr_w2_b": right}
