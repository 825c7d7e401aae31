"""Where the rows are in a product: matrices, linear layers, einsum."""

from collections.abc import Sequence

from torch import Tensor

from gift.bank import kinds
from gift.bank.call import Call
from gift.bank.places import SAME, Mixed, Operand, Place, Rows, aligned


def product(call: Call, which: int) -> Place:
    """Return the place in a product whose axes `kinds.PRODUCTS` spells."""
    operator = kinds.PRODUCTS[call.name]
    return _multiplied(call, operator, call.tensors, which)


def matmul(call: Call, which: int) -> Place:
    """Return the place in a product of matrices or vectors, with axes that are broadcast."""
    left, right = call.tensors if call.name != "__rmatmul__" else call.tensors[::-1]
    rows, columns = "i" * (left.ndim > 1), "k" * (right.ndim > 1)
    terms = f"{'...' * (left.ndim > 2)}{rows}j,{'...' * (right.ndim > 2)}j{columns}"
    dots = "..." * (left.ndim > 2 or right.ndim > 2)
    return _multiplied(call, f"{terms}->{dots}{rows}{columns}", [left, right], which)


def added(call: Call, which: int) -> Place:
    """Return the place in the sum of a tensor and a product."""
    made = call.made[which]
    place = _multiplied(call, kinds.PRODUCTS[kinds.ADDED[call.name]], call.tensors[1:], which)
    return aligned([call.operand(call.x), (made.shape, place)], made.shape)


def summed(call: Call, which: int) -> Place:
    """Return the place in what `torch.einsum` computes."""
    equation: str = call.given(0, "equation")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = terms.replace("...", "").replace(",", "")
        once = sorted(letter for letter in {*letters} if letters.count(letter) == 1)
        result = "..." * ("..." in terms) + "".join(once)
    return _multiplied(call, f"{terms}->{result}", call.tensors, which)


def _multiplied(call: Call, equation: str, factors: Sequence[Tensor], which: int) -> Place:
    """Return the place in a product, given the letters of axes as for einsum."""
    terms, result = equation.split("->")
    letters = [_spelled(t, f.ndim) for t, f in zip(terms.split(","), factors, strict=False)]
    result = _spelled(result, call.made[which].ndim)
    if any(call.place_of(f) is not SAME for f in factors[len(letters) :]):
        raise Mixed("gets rows in an argument that all rows share")
    operands: list[Operand] = []
    for factor, term in zip(factors, letters, strict=False):
        place = call.place_of(factor)
        if isinstance(place, Rows):
            letter = term[place.axis]
            if letter not in result or term.count(letter) > 1:
                raise Mixed("sums over the axis of the rows")
            place = place.on(result.index(letter))
        shape = [factor.shape[term.index(a)] if a in term else 1 for a in result]
        operands.append((shape, place))
    return aligned(operands, call.made[which].shape)


def _spelled(term: str, ndim: int) -> str:
    """Return a term with digits for its dots, counted from the last."""
    named = term.replace("...", "")
    return term.replace("...", "9876543210"[10 - (ndim - len(named)) :])
