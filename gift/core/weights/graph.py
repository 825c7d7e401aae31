"""Nodes of effective weights in the graph of autograd, which hold no values of the weights.

An autograd function `_Made` represents the computation of the weight. Its output has the shape of
the weight but no memory. It saves no tensors, and computes the weight again in the backward pass
where needed. So a backward pass frees nothing that another one needs, checkpointing sees the same
saved tensors in each pass, and the intermediate results of a method are not stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gift.core.weights.calls import CALLS
from gift.kernels.torch_state import autocasts
from gift.private.torch.tensors import writes_of


class Making(Protocol):
    """A function that computes an effective weight from its inputs, the frozen tensor first."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The effective weight."""
        ...

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Split the gradient `g` of the weight into gradients of parts from which it is made.

        Returns:
            Pairs of a part and its gradient if there are parts cheaper than the weight, else None.
            The gradients have a graph only if `differentiable`.
        """
        ...


def node_of(again: "Again", value: Tensor) -> Tensor | None:
    """The node of a weight with these values; None without gradients."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in again.tensors):
        made: Tensor = _Made.apply(again, value, *again.tensors)
        return made
    return None


@dataclass(frozen=True, eq=False)
class Slices:
    """The matrices of an effective weight that is a batch of them, such as weights of experts.

    The gradient of one matrix goes to its own factors. Through the whole weight, each matrix that
    is read would need a gradient of the size of all matrices.

    Args:
        left: the left factors of the delta, one per matrix.
        right: the right factors.
        frozen: the frozen matrices.
    """

    left: Tensor
    right: Tensor
    frozen: Tensor

    def __call__(self, weight: Tensor, index: int) -> Tensor:
        """The matrix of the effective weight at `index`."""
        value = weight.detach()[index]
        making = _Sum()
        factors = self.left[index], self.right[index]
        tensors = self.frozen[index], *factors
        graph = _Made.apply(Again(making, tensors), value, *tensors)
        return at_node(graph, value)


class _Sum:
    """A `Making` of a frozen matrix plus the product of two factors."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        frozen, left, right = tensors
        return (frozen.to(left.dtype) + left @ right).to(frozen.dtype)

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]]:
        frozen, left, right = tensors
        return [(frozen, g), *product_parts(left, right, g, 1, differentiable)]


def product_parts(
    left: Tensor, right: Tensor, g: Tensor, scale: float, differentiable: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of factor and gradient, for ``scale * left @ right`` with the gradient `g`."""
    with torch.set_grad_enabled(differentiable):
        g = g.to(left.dtype) if scale == 1 else g.to(left.dtype) * scale
        return [(left, g @ right.mH), (right, left.mH @ g)]


def cast_of(kind: str) -> torch.dtype | None:
    """The dtype of autocast on that type of device; None without autocast."""
    return torch.get_autocast_dtype(kind) if autocasts(kind) else None


def _autocast(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype == cast_of(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


class Again:
    """The values of a weight in backward passes, which are computed once for all that need them.

    Args:
        making: the function that computes the weight.
        tensors: its inputs, the frozen tensor first.
    """

    __slots__ = ("_cast", "_held", "_versions", "making", "tensors")

    def __init__(self, making: Making, tensors: tuple[Tensor, ...]) -> None:
        self.making, self.tensors = making, tensors
        self._versions = [writes_of(tensor) for tensor in tensors]
        self._cast = cast_of(tensors[0].device.type)
        self._held: tuple[list[Tensor], Tensor] | None = None

    def weight(self) -> Tensor:
        """Return the weight, with a graph if the backward pass is itself differentiated.

        Raises:
            RuntimeError: if an input was written since the forward pass.
        """
        if torch.is_grad_enabled():
            return self.of([tensor.view_as(tensor) for tensor in self.tensors])
        if self._held is None:  # until the node of the weight has its gradient
            tensors = [_leaf(tensor, tensor.requires_grad) for tensor in self.tensors]
            self._held = tensors, self.of(tensors)
        else:
            self.check(0)
        return self._held[1].detach()

    def taken(self) -> tuple[list[Tensor], Tensor] | None:
        """Return the inputs and the weight that `weight` computed last, and hold them no more."""
        held, self._held = self._held, None
        return held

    def is_current(self) -> bool:
        """Whether no input was written since the forward pass began."""
        return next(self._written(), None) is None

    def _written(self, first: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Inputs that were written since the forward pass, with the version that they had."""
        pairs = list(zip(self.tensors, self._versions, strict=True))
        return (pair for pair in pairs[first:] if writes_of(pair[0]) != pair[1])

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Compute the weight from these tensors, as in the forward pass."""
        self.check(0)
        with torch.enable_grad(), _autocast(tensors[0].device.type, self._cast):
            return self.making(*tensors)

    def check(self, first: int) -> None:
        """Raise if an input was written since the forward pass, as autograd does for saved ones.

        Args:
            first: the number of the first input that counts.
        """
        for tensor, version in self._written(first):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(tensor.shape)}, of which an adapted "
                f"weight was made, is at version {writes_of(tensor)}, expected version {version}"
            )


def _leaf(tensor: Tensor, needs: bool) -> Tensor:
    return tensor.detach().requires_grad_() if needs else tensor


class _Made(torch.autograd.Function):
    """Graph node of computing a weight; its output has the shape of the weight but no memory."""

    @staticmethod
    def forward(ctx: Any, again: Again, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.again = again
        ctx.set_materialize_grads(False)
        return value.new_full((), float("nan")).expand(value.shape)  # NaN shows any read

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        again: Again = ctx.again
        wanted = ctx.needs_input_grad[2:]
        taken = again.taken()
        if g is None:
            return (None,) * (2 + len(wanted))
        if CALLS.entries is not None:  # training inside a call changes the inputs
            CALLS.entries.clear()
        differentiable = torch.is_grad_enabled()
        tensors = [
            tensor.view_as(tensor) if differentiable else _leaf(tensor, needs)
            for tensor, needs in zip(again.tensors, wanted, strict=True)
        ]
        with torch.enable_grad(), _autocast(g.device.type, None):
            parts = again.making.parts(tensors, g, differentiable)
        if parts is not None:
            again.check(1)  # gradients of parts do not use the frozen tensor
        elif taken is not None and not differentiable:
            tensors, weight = taken
            again.check(0)
            parts = [(weight, g)]
        else:
            parts = [(again.of(tensors), g)]
        asked = [tensor for tensor, needs in zip(tensors, wanted, strict=True) if needs]
        found = iter(_gradients(parts, asked, differentiable))
        return (None, None, *(next(found) if needs else None for needs in wanted))


def _gradients(
    parts: list[tuple[Tensor, Tensor]], asked: list[Tensor], differentiable: bool
) -> list[Tensor | None]:
    """Gradients of the tensors in `asked`, from those of parts that were computed from them."""
    known = {id(part): gradient for part, gradient in parts}
    are_parts = len({*map(id, asked)} & known.keys()) == len(asked)
    if are_parts and not differentiable and all(part.grad_fn is None for part, _ in parts):
        return [known[id(tensor)] for tensor in asked]  # the parts are these tensors
    trained = [(part, gradient) for part, gradient in parts if part.requires_grad]
    outputs, gradients = [part for part, _ in trained], [gradient for _, gradient in trained]
    return list(
        torch.autograd.grad(
            outputs, asked, gradients, create_graph=differentiable, allow_unused=True
        )
    )


def at_node(graph: Tensor, value: Tensor) -> Tensor:
    """Attach values to their node."""
    held: Tensor = _Held.apply(graph, value)
    return held


class _Held(torch.autograd.Function):
    """The values of a weight, attached to its node in the graph."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None
