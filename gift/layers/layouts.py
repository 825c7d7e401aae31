"""How a layer's weight is read as a matrix, or as one matrix for each of its groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gift.errors import AdaptationError
from gift.private.torch.layers import knows_recurrent

ConvLayout = Literal["balanced", "out_as_h"]

LAYOUT_CHOICES = ("conv_layout", "split_qkv")  # what users choose; methods choose the others


@dataclass(frozen=True)
class LayoutOptions:
    """Options for how weights are read as matrices.

    Args:
        conv_layout: ``"balanced"`` sees a convolution's weight ``(o, i, kh, kw)`` as a matrix of
            ``o*kh`` rows and ``i*kw`` columns, ``"out_as_h"`` as ``(o, i*kh*kw)``. Elements keep
            their order in memory: in the balanced layout each output has `kh` rows, which cut its
            flattened ``(i, kh, kw)`` into equal chunks. With `n` kernel axes, the first ``n // 2``
            of them count for the rows. None is the method's own choice.
        split_qkv: see the packed ``in_proj_weight`` of ``nn.MultiheadAttention`` as three
            matrices (query, key, value), each with its own factors, instead of one.
        rows_are_outputs: read embeddings with output features as rows instead of tokens. The method
            decides this.
    """

    conv_layout: ConvLayout | None = None
    split_qkv: bool = False
    rows_are_outputs: bool = False

    def __post_init__(self) -> None:
        if self.conv_layout not in (None, "balanced", "out_as_h"):
            raise ValueError(
                f"conv_layout is {self.conv_layout!r}, expected 'balanced' or 'out_as_h'"
            )

    def settled(
        self, conv_layouts: tuple[ConvLayout, ...], rows_are_outputs: bool
    ) -> "LayoutOptions":
        """Complete the options for a method.

        Args:
            conv_layouts: the layouts that the method allows, its default first.
            rows_are_outputs: as in the options.

        Raises:
            ValueError: if another layout was chosen.
        """
        chosen = self.conv_layout or conv_layouts[0]
        if chosen not in conv_layouts:
            raise ValueError(
                f"conv_layout is {chosen!r}, which would split an output into several rows; this "
                f"method needs {' or '.join(map(repr, conv_layouts))}"
            )
        if (self.conv_layout, self.rows_are_outputs) == (chosen, rows_are_outputs):
            return self  # settled already
        return replace(self, conv_layout=chosen, rows_are_outputs=rows_are_outputs)


@dataclass(frozen=True)
class Layout:
    """How one weight is read as a matrix, or as one matrix for each of its groups.

    The matrix is ``weight.reshape(view).permute(order).reshape(matrix)``; the shape `matrix` is
    ``(rows, columns)`` or ``(groups, rows, columns)``.

    Args:
        shape: the weight's own shape.
        view: the shape in which its axes are split.
        order: the permutation that brings the axis of outputs before that of inputs.
        matrix: the shape as matrix or matrices.
        input_axis: the matrix axis along which the layer's input features lie: -1, or -2 for
            embeddings, whose rows are looked up.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    matrix: tuple[int, ...]
    input_axis: int = -1
    is_trivial: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Computed here, because torch.compile cannot trace the first access of a cached property.
        trivial = self.shape == self.matrix and list(self.order) == sorted(self.order)
        object.__setattr__(self, "is_trivial", trivial)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Reshape the weight to its matrix or matrices."""
        if self.is_trivial:
            return weight
        return weight.reshape(self.view).permute(self.order).reshape(self.matrix)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """Reshape the matrix or matrices to a weight."""
        if self.is_trivial:
            return matrix
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        permuted = [self.view[axis] for axis in self.order]
        return matrix.reshape(permuted).permute(inverse).reshape(self.shape)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """For each axis of the weight, which axis of the matrix it is: 0 for rows, 1 for columns.

        None if axes are split or merged, or if there are groups.
        """
        permuted = tuple(self.shape[axis] for axis in self.order) if self.view == self.shape else ()
        if len(self.matrix) != 2 or self.matrix not in (permuted, (*permuted, 1)):
            return None
        return tuple(map(self.order.index, range(len(self.shape))))

    def of_part(self, shape: tuple[int, ...]) -> "Layout":
        """Return the layout of a part of the weight along its axes, each of which is one here."""
        permuted = tuple(shape[axis] for axis in self.order)
        matrix = (*permuted, *self.matrix[len(permuted) :])
        return replace(self, shape=tuple(shape), view=tuple(shape), matrix=matrix)


@lru_cache(maxsize=512)
def _plain(shape: tuple[int, ...], matrix: tuple[int, ...], input_axis: int = -1) -> Layout:
    return Layout(shape, shape, tuple(range(len(shape))), matrix, input_axis)


def raw_layout(shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter of unknown meaning.

    Leading axes of length one are dropped. Then a vector or scalar is a column, a matrix is
    itself, three axes are a batch of matrices (experts), and more are ``(first, all others)``.
    """
    axes = shape
    while len(axes) > 2 and axes[0] == 1:
        axes = axes[1:]
    if len(axes) < 2:
        return _plain(shape, (math.prod(axes), 1))
    if len(axes) <= 3:
        return _plain(shape, axes)
    return _plain(shape, (axes[0], math.prod(axes[1:])))


def matrix_layout(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """Rows are the first axis: Linear, Bilinear, recurrent layers."""
    return _plain(shape, (shape[0], math.prod(shape[1:])))


def lookup_layout(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """Rows are the entries that are looked up, or output features if the method needs them.

    A factor per row that starts at zero leaves the padding row exactly as it is, and a tied output
    layer sees the same matrix.
    """
    if options.rows_are_outputs:
        return transposed_layout(module, shape, options)
    return _plain(shape, shape, input_axis=-2)


def transposed_layout(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """``(in, out)``, as in the ``Conv1D`` of transformers."""
    return Layout(shape, shape, (1, 0), (shape[1], shape[0]))


def attention_layout(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """Query, key and value packed above each other, or one of them."""
    packed = shape[0] == 3 * module.embed_dim
    if options.split_qkv and packed:
        return _plain(shape, (3, shape[0] // 3, shape[1]))
    return _plain(shape, shape)


def conv_layout(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """``(out, in / groups, *kernel)``."""
    return _conv(module.groups, shape, options, transposed=False)


def conv_transpose_layout(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """``(in, out / groups, *kernel)``."""
    return _conv(module.groups, shape, options, transposed=True)


def _conv(groups: int, shape: tuple[int, ...], options: LayoutOptions, transposed: bool) -> Layout:
    first, second, *kernel = shape
    n_rows = len(kernel) // 2 if options.conv_layout == "balanced" else 0
    into_rows, into_columns = math.prod(kernel[:n_rows]), math.prod(kernel[n_rows:])
    rows, columns = first // groups, second
    order = list(range(3 + len(kernel)))
    if transposed:
        rows, columns = columns, rows
        order[1], order[2] = 2, 1
    matrix: tuple[int, ...] = (rows * into_rows, columns * into_columns)
    if groups > 1:
        matrix = (groups, *matrix)
    return Layout(shape, (groups, first // groups, second, *kernel), tuple(order), matrix)


def recurrent_layout(module: nn.Module, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """As `matrix_layout`.

    Raises:
        AdaptationError: if this version of torch holds the weights of recurrent layers in another
            way.
    """
    if not knows_recurrent():
        raise AdaptationError(
            f"the recurrent layers of torch {torch.__version__} hold their weights in a way that "
            "gift does not know: they cannot be adapted"
        )
    return matrix_layout(module, shape, options)


def bias_layout(size: int, weights: Sequence[Layout]) -> Layout:
    """The layout of the bias that belongs to these weights: one row for each row of theirs."""
    if len(weights) == 1:
        matrix = (*weights[0].matrix[:-1], 1)
        return _plain((size,), matrix)
    return _plain((size,), (size, 1))
