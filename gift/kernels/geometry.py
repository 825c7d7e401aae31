"""What a convolution does, apart from its weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A convolution without groups whose borders are zeros.

    Args:
        shape: of its weight, ``(out, in, *kernel)``.
        stride, padding, dilation: for each axis of the kernel.
    """

    shape: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @property
    def kernel(self) -> Sizes:
        """Its sizes."""
        return self.shape[2:]

    @property
    def taps(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether each output sees one position."""
        return self.taps == 1 and not any(self.padding)

    @property
    def stride_one(self) -> bool:
        """Whether no position is left out."""
        return all(step == 1 for step in self.stride)

    @property
    def reach(self) -> Sizes:
        """By how much the last tap is apart from the first, for each axis."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def margins(self) -> Sizes:
        """By how much the taps reach over the padding, for each axis: it may be less than zero."""
        return tuple(r - p for r, p in zip(self.reach, self.padding, strict=True))

    def positions(self, sizes: Sizes) -> Sizes:
        """The sizes of the output for those of the input."""
        axes = zip(sizes, self.reach, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - reach - 1) // s + 1 for n, reach, s, p in axes)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution with such a weight, or with more or fewer outputs."""
        none = [0] * len(self.kernel)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, none, 1
        )

    def gradient_of_input(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """From that of the output; `x` tells the shape."""
        found: Tensor = self._backward(g, x, weight, [True, False, False])[0]
        return found

    def gradient_of_weight(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """From that of the output; `weight` tells the shape."""
        found: Tensor = self._backward(g, x, weight, [False, True, False])[1]
        return found

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, of_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Those of the input, if asked for, and of the weight, which share some work."""
        of_x, of_weight, _ = self._backward(g, x, weight, [of_input, True, False])
        return of_x, of_weight

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
        none = [0] * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, self.stride, self.padding, self.dilation, False, none, 1, wanted
        )
