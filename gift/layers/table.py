"""Table of layer types and how each holds its weights; the only file that knows layers.

A *row* says which tensors of a layer are weights, which are biases, and how a weight is read as a
matrix. Everything else (methods, adapting, saving) works on matrices. A layer type without a row
can be adapted by a parameter cap, with the layout of a raw parameter.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gift.errors import AdaptationError
from gift.private.torch import CONV, CONV_TRANSPOSE, FlatWeights, knows_recurrent
from gift.support.weak import known_by_class

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
                f"conv_layout is {chosen!r}, which would cut outputs into several rows; this "
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


def _matrix(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """Rows are the first axis: Linear, Bilinear, recurrent layers."""
    return _plain(shape, (shape[0], math.prod(shape[1:])))


def _lookup(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """Rows are the entries that are looked up, or output features if the method needs them.

    A factor per row that starts at zero leaves the padding row exactly as it is, and a tied output
    layer sees the same matrix.
    """
    if options.rows_are_outputs:
        return _transposed(module, shape, options)
    return _plain(shape, shape, input_axis=-2)


def _transposed(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """``(in, out)``, as in the ``Conv1D`` of transformers."""
    return Layout(shape, shape, (1, 0), (shape[1], shape[0]))


def _attention(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    packed = shape[0] == 3 * module.embed_dim
    if options.split_qkv and packed:
        return _plain(shape, (3, shape[0] // 3, shape[1]))
    return _plain(shape, shape)


def _conv(module: Any, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    """``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if transposed."""
    first, second, *kernel = shape
    groups = module.groups
    n_rows = len(kernel) // 2 if options.conv_layout == "balanced" else 0
    into_rows, into_columns = math.prod(kernel[:n_rows]), math.prod(kernel[n_rows:])
    rows, columns = first // groups, second
    order = list(range(3 + len(kernel)))
    if isinstance(module, CONV_TRANSPOSE):
        rows, columns = columns, rows
        order[1], order[2] = 2, 1
    matrix: tuple[int, ...] = (rows * into_rows, columns * into_columns)
    if groups > 1:
        matrix = (groups, *matrix)
    return Layout(shape, (groups, first // groups, second, *kernel), tuple(order), matrix)


def _recurrent(module: nn.Module, shape: tuple[int, ...], options: LayoutOptions) -> Layout:
    if not knows_recurrent():
        raise AdaptationError(
            f"the recurrent layers of torch {torch.__version__} hold their weights in a way that "
            "gift does not know: they cannot be adapted"
        )
    return _matrix(module, shape, options)


class DenseGradient:
    """Mixin of adapted embeddings that ignores ``sparse=True``: gradients are dense.

    ``sparse=True`` requests sparse gradients of the table. The adapted table is frozen and its
    delta is small, and most optimizers refuse sparse gradients.
    """

    @property
    def sparse(self) -> bool:
        """Always False while the table is adapted."""
        return False

    @sparse.setter
    def sparse(self, value: bool) -> None:
        self.__dict__["sparse"] = value


@dataclass(frozen=True)
class LayerRow:
    """One layer type.

    Args:
        kind: the type, or its dotted path if the package may be absent.
        weights: glob patterns for the names of its weights.
        layout: reads a weight's shape as a matrix.
        biases: glob patterns for the names of its biases, for ``train_bias``.
        family: the name for users: see `mc_layer`.
        mixin: a class put in front of the adapted layer's own.
        bias_of: maps a weight's name to that of the bias which is added to its outputs.
    """

    kind: type[nn.Module] | str
    weights: tuple[str, ...]
    layout: Callable[[Any, tuple[int, ...], LayoutOptions], Layout]
    family: str
    biases: tuple[str, ...] = ("bias",)
    mixin: type | None = None
    bias_of: Callable[[str], str] = lambda weight: weight.replace("weight", "bias")

    def matches(self, cls: type) -> bool:
        """Whether `cls` is this type of layer or a subclass of it."""
        if isinstance(self.kind, type):
            return issubclass(cls, self.kind)
        package, _, name = self.kind.rpartition(".")
        return issubclass(cls, getattr(sys.modules.get(package), name, ()))

    def names(self, module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
        """Names of the tensors of `module` that match any of the patterns.

        A tensor that is computed before use (by a parametrization, weight norm, pruning) is not a
        parameter, but counts under its own name. The tensors from which it is computed do not
        count.
        """
        computed = list(getattr(module._modules.get("parametrizations"), "keys", list)())
        computed += [name for name, value in vars(module).items() if isinstance(value, Tensor)]
        sources = {name + suffix for name in computed for suffix in ("_g", "_v", "_orig")}
        found = [n for n, p in module._parameters.items() if p is not None and n not in sources]
        return [name for name in computed + found if _names(patterns, name)]


LAYERS: tuple[LayerRow, ...] = (
    LayerRow(nn.Linear, ("weight",), _matrix, "linear"),
    LayerRow("transformers.pytorch_utils.Conv1D", ("weight",), _transposed, "linear"),
    LayerRow(CONV, ("weight",), _conv, "conv"),
    LayerRow(nn.Embedding, ("weight",), _lookup, "embedding", biases=(), mixin=DenseGradient),
    LayerRow(nn.EmbeddingBag, ("weight",), _lookup, "embedding", biases=(), mixin=DenseGradient),
    LayerRow(nn.Bilinear, ("weight",), _matrix, "bilinear"),
    LayerRow(nn.RNNBase, ("weight_*",), _recurrent, "recurrent", ("bias_*",), mixin=FlatWeights),
    LayerRow(nn.RNNCellBase, ("weight_*",), _matrix, "recurrent", ("bias_*",)),
    LayerRow(
        nn.MultiheadAttention,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        _attention,
        "attention",
        biases=("in_proj_bias",),
        bias_of=lambda weight: (
            "in_proj_bias"
        ),  # of all three projections, also where they are apart
    ),
)

FAMILIES = tuple(dict.fromkeys(row.family for row in LAYERS))


def _names(patterns: tuple[str, ...], name: str) -> bool:
    return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def row_of(cls: type) -> LayerRow | None:
    """The row of a layer class, or None if its weights are unknown."""
    return _row_of(cls, "transformers.pytorch_utils" in sys.modules)


@known_by_class
def _row_of(cls: type, with_transformers: bool) -> LayerRow | None:
    # The package may be imported after the first call, so its presence is part of the cache key.
    return next((row for row in LAYERS if row.matches(cls)), None)


CONV1D_FORWARD = "transformers.pytorch_utils.Conv1D.forward"

# Layers whose parents read their weights and never call the layers.
_READ = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
}


def reader_of(parent: nn.Module | None, name: str) -> type | None:
    """The class of `parent` that reads the weight of its layer `name` without calling the layer."""
    for cls in type(parent).__mro__:
        if name in _READ.get(f"{cls.__module__}.{cls.__qualname__}", ()):
            return cls
    return None


def bias_layout(size: int, weights: Sequence[Layout]) -> Layout:
    """The layout of the bias that belongs to these weights: one row for each row of theirs."""
    if len(weights) == 1:
        matrix = (*weights[0].matrix[:-1], 1)
        return _plain((size,), matrix)
    return _plain((size,), (size, 1))


def layout_of(module: nn.Module, tensor: str, shape: torch.Size, options: LayoutOptions) -> Layout:
    """The layout that reads the tensor `tensor` of `module` as a matrix."""
    row = row_of(type(module))
    if row is not None and _names(row.weights, tensor):
        return row.layout(module, tuple(shape), options)
    return raw_layout(tuple(shape))


def dotted(function: Callable[..., Any]) -> str:
    """The dotted name of a function, as in the keys of `Method.forwards`."""
    return f"{function.__module__}.{function.__qualname__}"
