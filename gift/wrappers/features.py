"""The number of input and output features of a module, and their axis."""

from collections.abc import Iterator

from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.errors import AdaptationError
from gift.layers.table import Features, is_part_of_layer, known_features
from gift.support.tensors import is_inexact


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in `module` in registration order: known, or with parameters."""
    if is_part_of_layer(module):
        return
    inside = [part for name, child in module.named_children()
              for part in _layers(child, f"{path}.{name}".strip("."))]  # fmt: skip
    if known_features(module) is not None or (
        not inside and any(True for _ in module.parameters())
    ):
        yield path, module
    else:
        yield from inside


def _features(layer: nn.Module) -> Features | None:
    """Return the features of a layer, or None if they are unknown."""
    found = known_features(layer)
    if found is not None:
        return found
    # A custom norm or scale has one vector with an entry for each feature.
    sizes = {p.numel() if p.ndim == 1 else 0 for p in layer.parameters()}
    size = sizes.pop() if len(sizes) == 1 else 0
    return Features(size, size) if size > 1 else None


def inputs_of(module: nn.Module) -> int | None:
    """Return the number of input features along the last axis, if the first layer reveals it."""
    first = next((_features(layer) for _, layer in _layers(module)), None)
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
    first = _features(layers[0][1]) if layers else None
    last = _features(layers[-1][1]) if layers else None
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
        return "no layer in it reveals its features: give dim= and axis="
    path, layer = layers[-1]
    name = plain_class(type(layer)).__name__
    return f"the features of {path or 'this'} ({name}) are not known: give dim= and axis="


def weight_beside(module: nn.Module) -> Tensor | None:
    """Return a parameter of the module whose dtype and device new parameters should have."""
    floating = (p for p in module.parameters() if is_inexact(p))
    return next(floating, next(module.parameters(), None))
