"""Table of layer types: the only file that knows which layers there are and what each of them is.

A *row* says which tensors of a layer are weights, which are biases, how a weight is read as a
matrix, which features the layer has, and what its forward functions compute. Everything else
(methods, attaching, files of other libraries) works on matrices, features and operations. A layer
type without a row can be adapted by a parameter cap, with the layout of a raw parameter.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from gift.layers.layouts import (
    Layout,
    LayoutOptions,
    attention_layout,
    conv_layout,
    conv_transpose_layout,
    lookup_layout,
    matrix_layout,
    raw_layout,
    recurrent_layout,
    transposed_layout,
)
from gift.private.torch.layers import CONV, CONV_TRANSPOSE, NORM_WITH_STATISTICS, FlatWeights
from gift.support.tensors import tensors_among
from gift.support.weak import known_by_class

Operation = Literal[
    "linear", "packed linear", "transposed linear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding", "packed embedding",
    "attention", "",
]  # fmt: skip
"""What a forward function computes: "transposed" is ``x @ weight``, "packed" reads quantised data
instead of the weight, and "" is unknown."""


def dotted(function: Callable[..., Any]) -> str:
    """The dotted name of a function, as in the keys of `Method.forwards`."""
    return f"{function.__module__}.{function.__qualname__}"


class Features(NamedTuple):
    """The features of a layer.

    Args:
        inputs: number of input features; None for layers that look features up, like embeddings.
        outputs: number of output features.
        axis: axis of the features.
    """

    inputs: int | None
    outputs: int
    axis: int = -1


def _linear_features(m: Any) -> Features:
    return Features(m.in_features, m.out_features)


def _conv_features(m: Any) -> Features:
    # Counted from the end, an axis is the same with and without a batch.
    return Features(m.in_channels, m.out_channels, -1 - len(m.kernel_size))


def _lookup_features(m: Any) -> Features:
    return Features(None, m.embedding_dim)


def _recurrent_features(m: Any) -> Features:
    size = getattr(m, "proj_size", 0) or m.hidden_size
    return Features(m.input_size, size * (1 + getattr(m, "bidirectional", False)))


def _same_features(name: str, axis: int) -> Callable[[Any], Features]:
    return lambda m: Features(getattr(m, name), getattr(m, name), axis)


def _linear_like(old: Any, outputs: int, **factory: Any) -> nn.Module:
    return nn.Linear(old.in_features, outputs, old.bias is not None, **factory)


def _conv_like(old: Any, outputs: int, **factory: Any) -> nn.Module:
    return CONVOLUTIONS[len(old.kernel_size) - 1](
        old.in_channels, outputs, old.kernel_size, old.stride, old.padding, old.dilation,
        bias=old.bias is not None, padding_mode=old.padding_mode, **factory,
    )  # fmt: skip


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
        kind: the type or types, or its dotted path if the package may be absent.
        weights: glob patterns for the names of its weights.
        layout: reads a weight's shape as a matrix.
        family: the name for users: see `mc_layer`.
        features: numbers of features of a layer.
        forwards: what the forward functions of this type and its subclasses compute, by their
            dotted names.
        biases: glob patterns for the names of its biases, for ``train_bias``.
        mixin: a class put in front of the adapted layer's own.
        bias_of: maps a weight's name to that of the bias which is added to its outputs.
        outputs_first: whether the weight is ``(outputs, inputs, ...)``.
        like: makes a layer like another one with a number of outputs and the given device and
            dtype, where heads can be of this type.
    """

    kind: type[nn.Module] | tuple[type[nn.Module], ...] | str
    weights: tuple[str, ...]
    layout: Callable[[Any, tuple[int, ...], LayoutOptions], Layout]
    family: str
    features: Callable[[Any], Features]
    forwards: Mapping[str, Operation] = field(default_factory=dict)
    biases: tuple[str, ...] = ("bias",)
    mixin: type | None = None
    bias_of: Callable[[str], str] = lambda weight: weight.replace("weight", "bias")
    outputs_first: bool = True
    like: Callable[..., nn.Module] | None = None

    @property
    def keeps_weights(self) -> bool:
        """Whether the layer keeps a list of its weights and reads that instead of their names."""
        return self.mixin is FlatWeights

    def matches(self, cls: type) -> bool:
        """Whether `cls` is this type of layer or a subclass of it."""
        if not isinstance(self.kind, str):
            return issubclass(cls, self.kind)
        package, _, name = self.kind.rpartition(".")
        return issubclass(cls, getattr(sys.modules.get(package), name, ()))

    def names(self, module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
        """Names of the tensors of `module` that match any of the patterns.

        A tensor that is computed before use (by a parametrization, weight norm, pruning) is not a
        parameter, but counts under its own name. The tensors from which it is computed do not
        count.
        """
        names = [name for name, p in module._parameters.items() if p is not None]
        computed = tensors_among(vars(module))
        if "parametrizations" in module._modules:
            computed = [*getattr(module._modules["parametrizations"], "keys", list)(), *computed]
        if computed:
            sources = {name + suffix for name in computed for suffix in ("_g", "_v", "_orig")}
            names = [*computed, *(name for name in names if name not in sources)]
        return [name for name in names if _names(patterns, name)]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Convolutions that are not transposed, by the number of their axes."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Transposed convolutions, by the number of their axes."""

_BNB = "bitsandbytes.nn.modules"
LAYERS: tuple[LayerRow, ...] = (
    LayerRow(
        nn.Linear, ("weight",), matrix_layout, "linear", _linear_features,
        {
            dotted(nn.Linear.forward): "linear",
            f"{_BNB}.Linear4bit.forward": "packed linear",
            f"{_BNB}.Linear8bitLt.forward": "packed linear",
        },
        like=_linear_like,
    ),
    LayerRow(
        "transformers.pytorch_utils.Conv1D", ("weight",), transposed_layout, "linear",
        lambda m: Features(*m.weight.shape),
        {"transformers.pytorch_utils.Conv1D.forward": "transposed linear"},
        outputs_first=False,
    ),
    LayerRow(
        CONV_TRANSPOSE, ("weight",), conv_transpose_layout, "conv", _conv_features,
        {
            dotted(nn.ConvTranspose1d.forward): "conv_transpose1d",
            dotted(nn.ConvTranspose2d.forward): "conv_transpose2d",
            dotted(nn.ConvTranspose3d.forward): "conv_transpose3d",
        },
        outputs_first=False,
    ),
    LayerRow(
        CONV, ("weight",), conv_layout, "conv", _conv_features,
        {
            dotted(nn.Conv1d.forward): "conv1d",
            dotted(nn.Conv2d.forward): "conv2d",
            dotted(nn.Conv3d.forward): "conv3d",
        },
        like=_conv_like,
    ),
    LayerRow(
        nn.Embedding, ("weight",), lookup_layout, "embedding", _lookup_features,
        {
            dotted(nn.Embedding.forward): "embedding",
            f"{_BNB}.Embedding4bit.forward": "packed embedding",
            f"{_BNB}.Embedding8bit.forward": "packed embedding",
        },
        biases=(), mixin=DenseGradient, outputs_first=False,
    ),
    LayerRow(
        nn.EmbeddingBag, ("weight",), lookup_layout, "embedding", _lookup_features,
        biases=(), mixin=DenseGradient, outputs_first=False,
    ),
    LayerRow(
        nn.Bilinear, ("weight",), matrix_layout, "bilinear",
        lambda m: Features(m.in1_features, m.out_features),
    ),
    LayerRow(
        nn.RNNBase, ("weight_*",), recurrent_layout, "recurrent", _recurrent_features,
        biases=("bias_*",), mixin=FlatWeights,
    ),
    LayerRow(
        nn.RNNCellBase, ("weight_*",), matrix_layout, "recurrent", _recurrent_features,
        biases=("bias_*",),
    ),
    LayerRow(
        nn.MultiheadAttention,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        attention_layout, "attention", _same_features("embed_dim", -1),
        {dotted(nn.MultiheadAttention.forward): "attention"},
        biases=("in_proj_bias",),
        bias_of=lambda weight: "in_proj_bias",  # of all projections, also where apart
    ),
)  # fmt: skip


@dataclass(frozen=True)
class NormRow:
    """One type of norm layers, whose weights are vectors, and so no matrices.

    Args:
        kind: the type or types.
        features: numbers of features of a layer.
    """

    kind: type[nn.Module] | tuple[type[nn.Module], ...]
    features: Callable[[Any], Features]


NORMS: tuple[NormRow, ...] = (
    NormRow(NORM_WITH_STATISTICS, _same_features("num_features", 1)),
    NormRow(nn.GroupNorm, _same_features("num_channels", 1)),
    NormRow(
        (nn.LayerNorm, nn.RMSNorm),
        lambda m: Features(m.normalized_shape[-1], m.normalized_shape[-1]),
    ),
)


_NO_LAYERS = (ParametrizationList, nn.PReLU)


def is_part_of_layer(module: nn.Module) -> bool:
    """Whether a module has parameters and is not a layer: parametrizations, activations."""
    return isinstance(module, _NO_LAYERS)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer of torch, or of a subclass of one."""
    return any(isinstance(module, row.kind) for row in NORMS)


def known_features(module: nn.Module) -> Features | None:
    """The features of a layer by its type, or None if its type is unknown."""
    row: LayerRow | NormRow | None = row_of(type(module))
    row = row or next((row for row in NORMS if isinstance(module, row.kind)), None)
    return None if row is None else row.features(module)


_OPERATIONS = {name: operation for row in LAYERS for name, operation in row.forwards.items()}


def operation_of(cls: type[nn.Module]) -> Operation:
    """What the forward function of a plain class computes; "" if the class has its own."""
    return _OPERATIONS.get(dotted(cls.forward), "")


def forwards_of(*operations: Operation) -> list[str]:
    """Dotted names of the forward functions that compute one of these operations."""
    return [name for name, operation in _OPERATIONS.items() if operation in operations]


FAMILIES = tuple(dict.fromkeys(row.family for row in LAYERS))


def family_of(module: nn.Module) -> str:
    """The family of a layer, as `mc_layer` takes it; "" if its type has no row."""
    row = row_of(type(module))
    return "" if row is None else row.family


@lru_cache(maxsize=1024)
def _names(patterns: tuple[str, ...], name: str) -> bool:
    return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def row_of(cls: type) -> LayerRow | None:
    """The row of a layer class, or None if its weights are unknown."""
    return _row_of(cls, "transformers.pytorch_utils" in sys.modules)


@known_by_class
def _row_of(cls: type, with_transformers: bool) -> LayerRow | None:
    # The package may be imported after the first call, so its presence is part of the cache key.
    return next((row for row in LAYERS if row.matches(cls)), None)


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


def layout_of(
    module: nn.Module, tensor: str, shape: tuple[int, ...], options: LayoutOptions
) -> Layout:
    """The layout that reads the tensor `tensor` of `module` as a matrix."""
    row = row_of(type(module))
    if row is not None and _names(row.weights, tensor):
        return row.layout(module, tuple(shape), options)
    return raw_layout(tuple(shape))
