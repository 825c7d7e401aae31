"""One call of a function, as the rules for rows see it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gift.bank.places import SAME, Mixed, Operand, Place, Rows, aligned

# The types of `torch.ops.aten.add` and `torch.ops.aten.add.Tensor`, which have no public names.
_OPERATORS = ("OpOverloadPacket", "OpOverload")
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod")}
_IN_PLACE |= {f"__i{name}__" for name in ("pow", "and", "or", "xor", "lshift", "rshift")}
_FIRST = ("input", "self", "input1", "x1", "mat1", "batch1", "mat", "query", "tensors")


class Call:
    """A call of a function of torch.

    Attributes:
        tensors: all tensors among the arguments, in order, but not one that is written to by `out`.

    Args:
        name: what `name_of` gives.
        func: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        n: number of rows.
        place_of: where the rows are in a tensor.
        made: the results.
    """

    def __init__(
        self,
        name: str,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        n: int,
        place_of: Callable[[Tensor], Place],
        made: list[Tensor],
    ) -> None:
        self.name, self.func, self.args, self.kwargs = name, func, args, kwargs
        self.n, self.place_of, self.made = n, place_of, made
        self.tensors = list(tensors_of(args))
        if kwargs:
            names = sorted((n for n in kwargs if n != "out"), key=lambda n: n not in _FIRST)
            self.tensors += tensors_of([kwargs[name] for name in names])

    def given(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def x(self) -> Tensor:
        """The first argument."""
        return self.tensors[0]

    def operand(self, tensor: Tensor) -> Operand:
        """Return the shape and the place of a tensor."""
        return tensor.shape, self.place_of(tensor)

    def together(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> Place:
        """Return the place in a result to which tensors are broadcast."""
        return aligned([self.operand(tensor) for tensor in tensors], shape)

    def only_first(self) -> Rows:
        """Return the place of the first tensor, the only one that has rows."""
        return self.only(self.x, self.tensors[1:])

    def only(self, x: Tensor, others: Sequence[Tensor]) -> Rows:
        """Return the place of a tensor; no other one may have rows."""
        place = self.place_of(x)
        if not isinstance(place, Rows) or any(self.place_of(t) is not SAME for t in others):
            raise Mixed("gets rows in an argument that all rows share")
        return place


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


def name_of(func: Any) -> str:
    """Return a function's name without a trailing underscore; for an attribute, its name.

    `F.unfold` is `im2col`, since a method of tensors has its name. Operators of other libraries
    have theirs in front.
    """
    name: str = getattr(func, "__name__", type(func).__name__)
    if func is F.unfold:
        return "im2col"
    if name == "__get__":
        return str(func.__self__.__name__)
    if type(func).__name__ in _OPERATORS:
        space, _, name = str(func).partition(".")
        name = name.partition(".")[0]
        if space != "aten":
            return f"{space}::{name}"
    return name if name.endswith("__") else name.rstrip("_")


def writes(func: Any) -> bool:
    """Return whether a function writes to its first argument."""
    name: str = getattr(func, "__name__", "").partition(".")[0]
    if not name.endswith("__"):
        return name.endswith("_")
    return name in ("__setitem__", "__set__") or (name.startswith("__i") and name in _IN_PLACE)
