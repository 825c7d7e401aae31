"""The number of input and output features of a module, and their axis."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gift.core.dynamic_class import plain_class
from gift.errors import AdaptationError
from gift.private.torch import CONV, NORM_WITH_STATISTICS
from gift.support.tensors import is_inexact


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


def _conv(m: Any) -> Features:
    # Counted from the end, an axis is the same with and without a batch.
    return Features(m.in_channels, m.out_channels, -1 - len(m.kernel_size))


def _norm(m: Any) -> Features:
    return Features(m.num_features, m.num_features, 1)


def _recurrent(m: Any) -> Features:
    size = getattr(m, "proj_size", 0) or m.hidden_size
    return Features(m.input_size, size * (1 + getattr(m, "bidirectional", False)))


_KNOWN: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], Features]], ...]
_KNOWN = (
    (nn.Linear, lambda m: Features(m.in_features, m.out_features)),
    (nn.Bilinear, lambda m: Features(m.in1_features, m.out_features)),
    (CONV, _conv),
    ((nn.Embedding, nn.EmbeddingBag), lambda m: Features(None, m.embedding_dim)),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
    (nn.MultiheadAttention, lambda m: Features(m.embed_dim, m.embed_dim)),
    (NORM_WITH_STATISTICS, _norm),
    (nn.GroupNorm, lambda m: Features(m.num_channels, m.num_channels, 1)),
    ((nn.LayerNorm, nn.RMSNorm),
     lambda m: Features(m.normalized_shape[-1], m.normalized_shape[-1])),
)  # fmt: skip


def _known(layer: nn.Module) -> Features | None:
    for kinds, features in _KNOWN:
        if isinstance(layer, kinds):
            return features(layer)
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    if isinstance(layer, conv1d):
        return Features(*layer.weight.shape)
    return None


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in `module` in registration order: known, or with parameters."""
    if isinstance(module, ParametrizationList | nn.PReLU):
        return
    inside = [part for name, child in module.named_children()
              for part in _layers(child, f"{path}.{name}".strip("."))]  # fmt: skip
    if _known(module) is not None or (not inside and any(True for _ in module.parameters())):
        yield path, module
    else:
        yield from inside


def _told(layer: nn.Module) -> Features | None:
    """Return the features of a layer, or None if they are unknown."""
    found = _known(layer)
    if found is not None:
        return found
    # A custom norm or scale has one vector with an entry for each feature.
    sizes = {p.numel() if p.ndim == 1 else 0 for p in layer.parameters()}
    size = sizes.pop() if len(sizes) == 1 else 0
    return Features(size, size) if size > 1 else None


def inputs_of(module: nn.Module) -> int | None:
    """Return the number of input features along the last axis, if the first layer reveals it."""
    first = next((_told(layer) for _, layer in _layers(module)), None)
    return first.inputs if first is not None and first.axis == -1 else None


def features_of(module: nn.Module, dim: int | None = None, axis: int | None = None) -> Features:
    """Return a module's features: inputs from its first layer, outputs from its last one.

    Args:
        module: a layer, or a module that contains layers.
        dim: the number of features, if the module does not reveal it, or wrongly.
        axis: the axis of the features, if the module does not reveal it, or wrongly.

    Raises:
        AdaptationError: if the features cannot be determined.
    """
    layers = list(_layers(module))
    first = _told(layers[0][1]) if layers else None
    last = _told(layers[-1][1]) if layers else None
    if last is None and dim is None:
        raise AdaptationError(_unknown(layers))
    if axis is None and first is not None and last is not None:
        axes = (first.axis, last.axis)
        if min(axes) < -1 and -1 in axes:
            raise AdaptationError(
                f"its first layer, {layers[0][0]}, has features along axis {axes[0]} and its last "
                f"one, {layers[-1][0]}, along axis {axes[1]}: say axis=1 or axis=-1"
            )
    if axis is None:
        axis = -1 if last is None else last.axis
    if dim is not None:
        return Features(dim, dim, axis)
    assert last is not None
    return Features(None if first is None else first.inputs, last.outputs, axis)


def _unknown(layers: list[tuple[str, nn.Module]]) -> str:
    if not layers:
        return "it has no layer that tells its features: say dim= and axis="
    path, layer = layers[-1]
    name = plain_class(type(layer)).__name__
    return f"the features of {path or 'this'} ({name}) are not known: say dim= and axis="


def weight_beside(module: nn.Module) -> Tensor | None:
    """Return a parameter of the module whose dtype and device new parameters should have."""
    floating = (p for p in module.parameters() if is_inexact(p))
    return next(floating, next(module.parameters(), None))
