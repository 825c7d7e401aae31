"""The sizes that a method can have for one kind of layer."""

import math
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import nn

from gift.engine.dry_run import Cost
from gift.errors import AdaptationError
from gift.methods import Method
from gift.methods.blocks import divisors
from gift.strategies.sized import setting_of, with_size


class Sizes:
    """The sizes that a method can have for a layer, and the cost of each.

    They are found by trial, since some methods reject sizes that do not divide a side of the
    matrix, or that are odd. Neighbours are tried up to a distance of `_NEAR`, then the divisors of
    the sides.

    Args:
        method: the method, with any size.
        weights: matrix shape and dtype of each of the weights that get one size.

    Raises:
        AdaptationError: if there is no such size.
    """

    def __init__(
        self, method: Method, weights: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    ) -> None:
        self.method = method
        self.weights = weights
        self.elements = sum(math.prod(shape) for shape, _ in weights)
        sides = {side for shape, _ in weights for side in shape[-2:]}
        self._longest = max(sides)
        self._divisors = sorted({divisor for side in sides for divisor in divisors(side)})
        self._costs: dict[int, tuple[Cost, int]] = {}
        self._settled: dict[int, int | None] = {}
        self._reason = ""
        self.least = self._above(0)
        if not self.least:
            raise AdaptationError(self._reason or f"{method} fits no size")
        self.most = self._down(last_that(self.least, self.elements, self._is_useful))
        full = self.cost(self.most)
        if full == self.cost(self.least):
            self.most = self.least
        else:  # larger sizes that add nothing are useless too
            cheaper = last_that(
                self.least, self.most, lambda size: self.cost(self._down(size)) < full
            )
            self.most = self._above(cheaper)

    def cost(self, size: int) -> Cost:
        """Return the cost of the layer with a possible size."""
        return self._costed(size)[0]

    def at_most(self, size: int) -> int:
        """Return the largest possible size up to `size`, or else the least possible one."""
        return self._down(min(max(size, self.least), self.most))

    def above(self, size: int) -> int:
        """Return the next larger size; 0 if there is none."""
        return 0 if size >= self.most else self._above(size)

    def _above(self, size: int) -> int:
        near = range(size + 1, size + 1 + _NEAR)
        far = self._divisors[bisect_left(self._divisors, size + 1 + _NEAR) :]
        return next((larger for larger in (*near, *far) if self._takes(larger)), 0)

    def _down(self, size: int) -> int:
        settled = self._settle(size)
        if settled is None and self._takes(self._longest + 1):
            # A size that need not divide a side is only rejected if it is too large.
            return last_that(self._longest + 1, size, self._takes)
        if settled is not None and settled <= size:
            return settled
        near = range(size, max(size - _NEAR, self.least), -1)
        far = self._divisors[: bisect_left(self._divisors, size)]
        found = (smaller for smaller in (*near, *reversed(far)) if self._takes(smaller))
        return next((smaller for smaller in found if smaller > self.least), self.least)

    def _takes(self, size: int) -> bool:
        return self._settle(size) == size

    def _settle(self, size: int) -> int | None:
        """Return the size that a requested one becomes; None if it is rejected."""
        if size not in self._settled:
            fitted = self._fitted(size)
            sizes = [getattr(method, setting_of(method)) for method in fitted]
            self._settled[size] = max(sizes, default=None)
        return self._settled[size]

    def _fitted(self, size: int) -> list[Method]:
        try:
            method = with_size(self.method, size)
            return [method.fit(shape) for shape, _ in self.weights]
        except ValueError as error:
            if isinstance(error, AdaptationError):
                self._reason = self._reason or str(error)
            return []

    def _is_useful(self, size: int) -> bool:
        """Whether no more deltas exceed their weight than with the least size."""
        return self._costed(self._down(size))[1] <= self._costed(self.least)[1]

    def _costed(self, size: int) -> tuple[Cost, int]:
        """Return the cost, and the number of weights that are smaller than their delta."""
        if size not in self._costs:
            total, larger = Cost(), 0
            for method, (shape, dtype) in zip(self._fitted(size), self.weights, strict=True):
                with torch.no_grad():
                    made = method.init_parameters(
                        torch.empty(shape, dtype=dtype, device="meta")
                    ).values()
                trained = [t for t in made if not isinstance(t, nn.Buffer)]
                saved = [t for t in made if not isinstance(t, nn.Buffer) or t.persistent]
                count = sum(t.numel() for t in trained)
                total += Cost(count, sum(t.numel() * t.element_size() for t in saved))
                larger += count > math.prod(shape)
            self._costs[size] = total, larger
        return self._costs[size]


_NEAR = 64


def last_that(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the last number for which `holds` is True, given that it is True first, then False.

    It must be True for `low`, and False for all numbers after the first for which it is False.
    """
    high = max(low, high)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
