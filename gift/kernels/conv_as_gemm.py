"""Convolutions with few filters, and their gradients, as matrix products.

Convolution kernels compute whole blocks of output channels, usually 16, and a low-rank delta has
fewer. Where the stride is one, the same values come from one product over the channels and a sum of
shifted images (`fold`), or from shifted images (`unfold`) and one product:

    h = fold(F x),    dF = unfold(dh) x^T,    dx = F^T unfold(dh)

Activations are viewed as ``(batch, channels, positions)``, which needs no copy in either memory
format. Where channels come in groups, the channels of each group are an example of the batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.geometry import Geometry, Sizes
from gift.kernels.products import for_each, outer, product


def add_product(y: Tensor, matrix: Tensor, x: Tensor, scale: float = 1) -> None:
    """Add ``scale matrix x`` to `y` in place; both are ``(batch, channels, *positions)``."""
    target, x, rows = y.flatten(2), x.flatten(2), for_each(matrix, x)
    if y.is_contiguous():
        target.baddbmm_(rows, x, alpha=scale)
    elif y.movedim(1, -1).is_contiguous():
        target.mT.baddbmm_(x.mT, rows.mT, alpha=scale)
    else:  # flattening makes a copy
        y.add_(torch.bmm(rows, x).view(y.shape), alpha=scale)


FEW = 2**15  # elements, up to which one slow operation takes less time than several fast ones


def fold(columns: Tensor, geometry: Geometry) -> Tensor:
    """Compute ``h[p] = sum over taps t of columns[t, p + t]``, one axis after the other.

    Args:
        columns: ``(batch, filters, *taps, *positions of the input)``.
        geometry: the convolution, of stride one.
    """
    axes = len(geometry.kernel)
    positions = geometry.positions(tuple(columns.shape[-axes:]))
    few = not torch.compiler.is_compiling() and columns.numel() < FEW
    if few and axes == 2 and min(geometry.margins) >= 0:
        turned = columns.flip(2, 3).flatten(4).flatten(1, 3)
        return F.fold(turned, positions, geometry.kernel, geometry.dilation, geometry.margins)
    for axis in range(-1, -axes - 1, -1):
        parts = columns.unbind(-axes - 1)  # the last remaining axis of taps
        shape = list(parts[0].shape)
        size, shape[axis] = shape[axis], positions[axis]
        columns = columns.new_zeros(shape)
        for tap, part in enumerate(parts):
            shift = tap * geometry.dilation[axis] - geometry.padding[axis]
            first, last = max(0, -shift), min(positions[axis], size - shift)
            if first < last:
                there = part.narrow(axis, first + shift, last - first)
                columns.narrow(axis, first, last - first).add_(there)
    return columns


def fold_transposed(columns: Tensor, geometry: Geometry, sizes: Sizes) -> Tensor:
    """Add up what each position of the input gives to each position of the output.

    Args:
        columns: ``(batch, filters * taps, positions of the input)``.
        geometry: a transposed convolution of one or two axes.
        sizes: the size of the input.
    """
    output, settings = _in_plane(geometry, geometry.positions(sizes))
    folded = F.fold(columns, output, **settings)
    return folded.squeeze(2) if len(sizes) == 1 else folded


def unfold_transposed(h: Tensor, geometry: Geometry) -> Tensor:
    """The adjoint of `fold_transposed`: ``(batch, filters, taps, positions of the input)``."""
    _, settings = _in_plane(geometry, ())
    columns = F.unfold(h.unsqueeze(2) if h.dim() == 3 else h, **settings)
    return columns.unflatten(1, (h.shape[1], geometry.taps))


def _in_plane(geometry: Geometry, sizes: Sizes) -> tuple[Sizes, dict[str, Sizes]]:
    """Sizes and settings for torch's functions, which know two axes only."""
    lines = len(geometry.kernel) == 1
    sizes = (1, *sizes) if lines else sizes
    settings = {
        "kernel_size": geometry.kernel,
        "dilation": geometry.dilation,
        "padding": geometry.padding,
        "stride": geometry.stride,
    }
    if lines:
        around = {"padding": 0}
        settings = {name: (around.get(name, 1), *size) for name, size in settings.items()}
    return sizes, settings


def unfold(h: Tensor, geometry: Geometry, sizes: Sizes) -> Tensor:
    """The adjoint of `fold`: ``(batch, filters, taps in reverse, positions of the input)``."""
    pads = [pad for pad in reversed(geometry.margins) for _ in range(2)]
    padded = F.pad(h, pads).contiguous()
    batch, filters, *steps = padded.stride()
    taps = [d * step for d, step in zip(geometry.dilation, steps, strict=True)]
    shape = (*h.shape[:2], *geometry.kernel, *sizes)
    shifted = padded.as_strided(shape, (batch, filters, *taps, *steps))
    return shifted.reshape(*h.shape[:2], geometry.taps, math.prod(sizes))


@dataclass(frozen=True)
class Filters:
    """The filters of a low-rank delta, whose outputs the layer combines linearly.

    Activations are those that `Geometry.split_groups` gives.

    Args:
        right: the factor ``(rank, columns)``, or ``(groups, rank, columns)``.
        cuts: the number of rows of the delta's matrix for each output. A filter is a row of `right`
            on one of `cuts` equal chunks of the flattened ``(in, *kernel)``, and zero elsewhere.
        geometry: the convolution.
        as_product: whether to compute by matrix products.
    """

    right: Tensor
    cuts: int
    geometry: Geometry
    as_product: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Return the filters' outputs for ``x (batch, in, *positions)``."""
        g = self.geometry
        if not self.as_product:
            return g.split_groups(g.apply(g.merge_groups(x), g.as_weight(self.weight())))
        if g.pointwise:
            seen = self._seen(x)
            return product(self._rows(), seen.flatten(2)).unflatten(2, seen.shape[2:])
        flat, taps = x.flatten(2), self._taps()
        parts = [product(taps[..., f, :, c].flatten(-3, -2), flat[:, c]) for f, c in self._chunks()]
        columns = parts[0] if self.cuts == 1 else torch.cat(parts, 1)
        if g.transposed:
            return fold_transposed(columns, g, tuple(x.shape[2:]))
        filters = columns.shape[1] // g.taps
        return fold(columns.view(x.shape[0], filters, *g.kernel, *x.shape[2:]), g)

    def prepared(self, gh: Tensor, x: Tensor) -> Tensor:
        """Prepare the gradient of the outputs for `gradient` and `add_input_gradient`."""
        if not self.as_product or self.geometry.pointwise:
            return gh
        if self.geometry.transposed:
            return unfold_transposed(gh, self.geometry)
        return unfold(gh, self.geometry, tuple(x.shape[2:]))

    def gradient(self, prepared: Tensor, x: Tensor) -> Tensor:
        """The gradient of `right`."""
        g = self.geometry
        if not self.as_product:
            whole = g.gradient_of_weight(
                g.merge_groups(prepared), g.merge_groups(x), g.as_weight(self.weight())
            )
            return self._of_right(g.as_filters(whole))
        if g.pointwise:
            return self._of_right(outer(prepared.flatten(2), self._seen(x).flatten(2), g.groups))
        flat = x.flatten(2)
        sizes = prepared.shape[1], g.taps, flat.shape[1]
        if self.cuts == 1:
            found = outer(prepared.flatten(1, 2), flat, g.groups).view(-1, *sizes)
        else:
            found = flat.new_zeros(g.groups, *sizes)
            for f, c in self._chunks():
                part = outer(prepared[:, f].flatten(1, 2), flat[:, c], g.groups)
                found[..., f, :, c] = part.unflatten(-2, (-1, g.taps))
        return self._of_right(self._turned(found).mT)

    def add_input_gradient(self, gx: Tensor, prepared: Tensor, x: Tensor) -> None:
        """Add the part of the gradient of `x` that flows through the filters to `gx` in place."""
        g = self.geometry
        if not self.as_product:
            weight = g.as_weight(self.weight())
            gx += g.split_groups(
                g.gradient_of_input(g.merge_groups(prepared), g.merge_groups(x), weight)
            )
        elif g.pointwise and g.stride_one:
            add_product(gx, self._rows().mT, prepared)
        elif g.pointwise:
            part = product(self._rows().mT, prepared.flatten(2))
            self._seen(gx).add_(part.unflatten(2, prepared.shape[2:]))
        else:
            turned = self._turned(self._taps()).flatten(-3, -2)
            add_product(gx, turned.mT, prepared.flatten(1, 2))

    def weight(self) -> Tensor:
        """Return all filters, ``(number, in, *kernel)`` or ``(groups, number, in, *kernel)``."""
        right = self.right
        if self.cuts > 1:
            chunks = torch.eye(self.cuts, dtype=right.dtype, device=right.device)
            right = chunks[:, None, :, None] * right[..., None, :, None, :]
        return right.reshape(*self.right.shape[:-2], -1, *self.geometry.shape[1:])

    def _of_right(self, gradient: Tensor) -> Tensor:
        """Return the gradient of `right`, given that of `weight`."""
        if self.cuts == 1:
            return gradient.reshape(self.right.shape)
        *groups, rank, _ = self.right.shape
        chunks = gradient.reshape(*groups, self.cuts, rank, self.cuts, -1)
        return chunks.diagonal(dim1=-4, dim2=-2).sum(-1)

    def _turned(self, taps: Tensor) -> Tensor:
        """Return ``(..., taps, in)`` with the taps in the order of `prepared`."""
        return taps if self.geometry.transposed else taps.flip(-2)

    def _seen(self, x: Tensor) -> Tensor:
        """Return the positions that a pointwise convolution reads."""
        for axis, step in enumerate(self.geometry.stride, 2):
            if step > 1:
                x = x[(slice(None),) * axis + (slice(None, None, step),)]
        return x

    def _rows(self) -> Tensor:
        """Pointwise filters as ``(..., number, in)``."""
        return self._taps().squeeze(-2)

    def _taps(self) -> Tensor:
        """The filters as ``(..., number, taps, in)``."""
        shape = *self.right.shape[:-2], -1, self.geometry.shape[1], self.geometry.taps
        return self.weight().reshape(shape).mT

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Yield which filters read which channels."""
        channels, rank = self.geometry.shape[1], self.right.shape[-2]
        for cut in range(self.cuts):
            first, last = cut * channels // self.cuts, -(-(cut + 1) * channels // self.cuts)
            yield slice(cut * rank, (cut + 1) * rank), slice(first, last)
