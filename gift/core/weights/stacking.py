"""A delta on top of a frozen one: the lower effective weight is the frozen weight of the upper.

The record of the upper delta refers to that of the lower one by `WeightDelta.below`. Both are
functions of a weight, each in its own layout, so any two methods can be stacked. Where all of them
add a product of two factors to one matrix, `Together` is their sum, with which fast paths compute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gift.core.weights.making import WeightMaking
from gift.kernels.products import scaled


@dataclass(frozen=True, eq=False)
class StackMaking:
    """A `Making` of an effective weight on top of another effective weight.

    Args:
        below: makes the lower weight.
        above: makes the upper weight from the lower one.
        count: the number of tensors that `below` takes beside the frozen one.
    """

    below: "WeightMaking | StackMaking"
    above: WeightMaking
    count: int

    def working_dtype(self, frozen: Tensor) -> torch.dtype:
        """The dtype for computing, exact for all deltas."""
        below = self.below.working_dtype(frozen)
        return torch.promote_types(below, self.above.working_dtype(frozen))

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The effective weight, rounded once to the frozen one's dtype."""
        frozen, *others = tensors
        lower = self.below(frozen.to(self.working_dtype(frozen)), *others[: self.count])
        return self.above(lower, *others[self.count :]).to(frozen.dtype)

    def parts(
        self, tensors: Sequence[Tensor], g: Tensor, differentiable: bool
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Gradients of the factors of a low-rank delta on top; None for others.

        The lower delta is frozen. If something trains it anyway, the whole weight must be computed.
        """
        frozen, *others = tensors
        if any(tensor.requires_grad for tensor in (frozen, *others[: self.count])):
            return None
        return self.above.parts([frozen, *others[self.count :]], g, differentiable)

    def factors(self, tensors: Sequence[Tensor]) -> None:
        """A stack gives no factors of its own."""
        return


@dataclass(frozen=True, eq=False)
class Together:
    """The sum of low-rank deltas of one matrix, as fast paths for low-rank methods take it.

    The parameters of the upper delta have the method's names; those below, which are frozen, have
    their number in front.

    Args:
        method: the method of the upper delta.
        below: the methods under it, the next one first.
    """

    method: Any
    below: tuple[Any, ...]

    @property
    def dropout(self) -> float:
        """The dropout of the upper delta; those under it have none, as they are not trained."""
        dropout: float = self.method.dropout
        return dropout

    @property
    def form(self) -> Any:
        """The form in which the upper method computes."""
        return self.method.form

    def own(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the upper delta."""
        return {key: value for key, value in parameters.items() if "/" not in key}

    def under(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors of the deltas below; their product is the sum of those deltas."""
        pairs = []
        for number, method in enumerate(self.below):
            lead = f"{number}/"
            own = {k.removeprefix(lead): v for k, v in parameters.items() if k.startswith(lead)}
            pairs.append(method.low_rank(own))
        lefts, rights = zip(*pairs, strict=True)
        return torch.cat(lefts, -1), torch.cat(rights, -2)

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors of the sum of all."""
        left, right, scale = self.scaled_low_rank(parameters)
        return scaled(left, scale), right

    def scaled_low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """The factors of the sum of all, and a scale of their product, which is 1."""
        left, right = self.method.low_rank(self.own(parameters))
        lower, further = self.under(parameters)
        return torch.cat([left, lower], -1), torch.cat([right, further], -2), 1
