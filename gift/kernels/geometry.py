"""The hyperparameters of a convolution, without its weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gift.kernels.depthwise import gradient_of_filters, is_quicker

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A convolution with zero padding.

    Args:
        shape: ``(out, in of one group, *kernel)``, the shape of the weight unless `transposed`.
        stride, padding, dilation: one value for each axis of the kernel.
        groups: the number of groups of channels.
        transposed: whether it is a transposed convolution, whose weight is ``(in, out of one group,
            *kernel)``.
        output_padding: of a transposed convolution: one value for each axis; empty if all are zero.
    """

    shape: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int = 1
    transposed: bool = False
    output_padding: Sizes = ()

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
        moved = self.transposed and not (self.stride_one and not any(self.output_padding))
        return self.taps == 1 and not any(self.padding) and not moved

    @property
    def stride_one(self) -> bool:
        """Whether the stride is one along all axes."""
        return all(step == 1 for step in self.stride)

    @property
    def shifts(self) -> bool:
        """Whether filters can be applied by one product and a sum of shifted images.

        torch sums images of one or two axes at strides above one, which transposed ones have.
        """
        if not self.transposed:
            return self.stride_one
        more = zip(self.output_padding, self.stride, strict=False)
        return len(self.kernel) < 3 and all(m < s for m, s in more)

    @property
    def depthwise(self) -> bool:
        """Whether each group has one input channel; if transposed, one output channel as well."""
        one = self.shape[1] == 1 and self.groups > 1
        return one and (not self.transposed or self.shape[0] == self.groups)

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
        axes = zip(sizes, self.reach, self.stride, self.padding, self._more, strict=True)
        if self.transposed:
            return tuple((n - 1) * s - 2 * p + reach + 1 + m for n, reach, s, p, m in axes)
        return tuple((n + 2 * p - reach - 1) // s + 1 for n, reach, s, p, _ in axes)

    @property
    def _more(self) -> Sizes:
        return self.output_padding or (0,) * len(self.kernel)

    def as_weight(self, filters: Tensor) -> Tensor:
        """Return filters ``(groups, number, in, *kernel)``, flattened or not, as a weight."""
        each = filters.reshape(self.groups, -1, *self.shape[1:])
        return (each.transpose(1, 2) if self.transposed else each).flatten(0, 1)

    def as_filters(self, weight: Tensor) -> Tensor:
        """The inverse of `as_weight`: ``(groups, number, in, *kernel)``."""
        each = weight.reshape(self.groups, -1, *weight.shape[1:])
        return each.transpose(1, 2) if self.transposed else each

    def split_groups(self, x: Tensor) -> Tensor:
        """Return activations with groups of channels as further examples of the batch."""
        if self.groups == 1:
            return x
        return x.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, *x.shape[2:])

    def merge_groups(self, x: Tensor) -> Tensor:
        """The inverse of `split_groups`."""
        if self.groups == 1:
            return x
        return x.reshape(x.shape[0] // self.groups, x.shape[1] * self.groups, *x.shape[2:])

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the convolution with the given weight, which may have another number of outputs."""
        return torch.convolution(x, weight, bias, *self._settings)

    def gradient_of_input(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input; `x` only gives its shape."""
        found: Tensor = self._backward(g, x, weight, [True, False, False])[0]
        return found

    def gradient_of_weight(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight; `weight` only gives its shape."""
        if self._by_gradients(g, x):
            return self.by_gradients(g, x)
        found: Tensor = self._backward(g, x, weight, [False, True, False])[1]
        return found

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, of_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of the input (if requested) and weight, which share some work."""
        if self._by_gradients(g, x):
            of_x = self.gradient_of_input(g, x, weight) if of_input else None
            return of_x, self.by_gradients(g, x)
        of_x, of_weight, _ = self._backward(g, x, weight, [of_input, True, False])
        return of_x, of_weight

    def by_gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of a depthwise weight, see `gift.kernels.depthwise`."""
        steps, kernel = (self.stride, self.dilation), self.kernel
        if self.transposed:
            return gradient_of_filters(x, g, kernel, self.padding, *steps)
        return gradient_of_filters(g, x, kernel, self.padding, *steps)

    def _by_gradients(self, g: Tensor, x: Tensor) -> bool:
        return self.depthwise and is_quicker(g, x, self.taps)

    @property
    def _settings(self) -> tuple[Any, ...]:
        steps = self.stride, self.padding, self.dilation
        return *steps, self.transposed, self._more, self.groups

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(g, x, weight, None, *self._settings, wanted)
