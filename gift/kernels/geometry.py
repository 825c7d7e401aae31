"""The hyperparameters of a convolution, without its weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A convolution without groups and with zero padding.

    Args:
        shape: shape of the weight, ``(out, in, *kernel)``.
        stride, padding, dilation: one value for each axis of the kernel.
    """

    shape: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @property
    def kernel(self) -> Sizes:
        """The size of the kernel."""
        return self.shape[2:]

    @property
    def taps(self) -> int:
        """The number of elements of the kernel."""
        return math.prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether each output reads a single position."""
        return self.taps == 1 and not any(self.padding)

    @property
    def stride_one(self) -> bool:
        """Whether the stride is one along all axes."""
        return all(step == 1 for step in self.stride)

    @property
    def reach(self) -> Sizes:
        """The distance between the first and the last tap, for each axis."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def margins(self) -> Sizes:
        """How far the taps reach beyond the padding, for each axis; it may be negative."""
        return tuple(r - p for r, p in zip(self.reach, self.padding, strict=True))

    def positions(self, sizes: Sizes) -> Sizes:
        """Return the output size for an input size."""
        axes = zip(sizes, self.reach, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - reach - 1) // s + 1 for n, reach, s, p in axes)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the convolution with the given weight, which may have another number of outputs."""
        none = [0] * len(self.kernel)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, none, 1
        )

    def gradient_of_input(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input; `x` only gives its shape."""
        found: Tensor = self._backward(g, x, weight, [True, False, False])[0]
        return found

    def gradient_of_weight(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight; `weight` only gives its shape."""
        found: Tensor = self._backward(g, x, weight, [False, True, False])[1]
        return found

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, of_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of the input (if requested) and weight, which share some work."""
        of_x, of_weight, _ = self._backward(g, x, weight, [of_input, True, False])
        return of_x, of_weight

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
        none = [0] * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, self.stride, self.padding, self.dilation, False, none, 1, wanted
        )
