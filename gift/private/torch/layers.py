"""Layer types: base classes, the computation of convolutions, the weights of recurrent layers."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gift.private.torch.parts import part

PARTS = (
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.conv._ConvTransposeNd",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.Conv2d._conv_forward",
    "torch.nn.ConvTranspose2d._output_padding",
    "torch.nn.LSTM._init_flat_weights",
)

CONV_TRANSPOSE: Any = part("torch.nn.modules.conv._ConvTransposeNd") or (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The base class of transposed convolutions, or a tuple of torch's classes, for ``isinstance``."""

CONV: Any = part("torch.nn.modules.conv._ConvNd") or (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    *(CONV_TRANSPOSE if isinstance(CONV_TRANSPOSE, tuple) else (CONV_TRANSPOSE,)),
)
"""The base class of all convolutions, transposed ones included, or a tuple of torch's classes."""

NORM_WITH_STATISTICS: Any = part("torch.nn.modules.batchnorm._NormBase") or (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d,
)
"""The base class of norm layers with running statistics, or a tuple of torch's classes."""


def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a convolution with another weight and bias.

    Subclasses override this private method to convolve in another way. Without the method they
    cannot, and the public function does the same.
    """
    own = getattr(layer, "_conv_forward", None)
    return _convolved(layer, x, weight, bias) if own is None else own(x, weight, bias)


def _convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    apply: Callable[..., Tensor] = getattr(F, f"conv{weight.dim() - 2}d")
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, padding_around(layer), mode=layer.padding_mode), 0
    return apply(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def convolves_as(layer: Any, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a layer uses the same convolution as one of these types: see `convolve`."""
    if "_conv_forward" in layer.__dict__:  # recipes for tileable images set it
        return False
    own = getattr(type(layer), "_conv_forward", None)
    return any(own is getattr(kind, "_conv_forward", None) for kind in kinds)


def convolve_transposed(
    layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: tuple[int, ...]
) -> Tensor:
    """Compute a transposed convolution with another weight and bias."""
    apply: Callable[..., Tensor] = getattr(F, f"conv_transpose{weight.dim() - 2}d")
    steps = layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    return apply(x, weight, bias, *steps)


def convolves_transposed_as(layer: Any, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a layer has the same output padding as one of these types of transposed convolutions.

    Subclasses may override this private method, to which torch gives the requested output size.
    Where it is gone, no subclass can.
    """
    if not isinstance(layer, tuple(kinds)) or "_output_padding" in layer.__dict__:
        return False
    own = getattr(type(layer), "_output_padding", None)
    return any(own is getattr(kind, "_output_padding", None) for kind in kinds)


def padding_around(layer: Any) -> tuple[int, ...]:
    """The padding that a convolution with a padding mode adds to its input, as for ``F.pad``."""
    own = getattr(layer, "_reversed_padding_repeated_twice", None)
    if own is not None:
        return tuple(own)
    axes = zip(layer.kernel_size, layer.dilation, strict=True)
    if layer.padding == "valid":
        sides = [(0, 0) for _ in axes]
    elif layer.padding == "same":
        totals = [d * (k - 1) for k, d in axes]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(padding, padding) for padding in layer.padding]
    return tuple(side for both in reversed(sides) for side in both)


class FlatWeights:
    """Mixin of recurrent layers that passes effective weights to their fused kernel.

    The kernel takes a list of weights, which the layer reads from this private name. Here the list
    is a property: it is computed when it is read, and never stored. There is no other way to pass
    weights to the kernel. If the name is gone, recurrent layers are refused (see
    `knows_recurrent`).
    """

    # ``__setattr__`` of nn.RNNBase would also write into the list.
    __setattr__ = nn.Module.__setattr__

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [self._gift_weight(name) for name in self._flat_weights_names]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass

    @property
    def _flat_weight_refs(self) -> Any:
        return vars(self).get("_flat_weight_refs")

    @_flat_weight_refs.setter
    def _flat_weight_refs(self, value: Any) -> None:
        # `_apply` empties the list and lets `_init_flat_weights` fill it, which does nothing here.
        # Copies are made of the plain layer, which needs the list that it had.
        pass

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: effective weights are new tensors each time."""

    @staticmethod
    def restored(module: nn.RNNBase) -> None:
        """Called when the layer is plain again: let the list refer to its weights."""
        module._init_flat_weights()


@functools.cache
def knows_recurrent() -> bool:
    """Whether recurrent layers of this torch read their weights as `FlatWeights` expects."""
    layer: Any = nn.LSTM(1, 1, device="meta")  # on meta it draws no random numbers
    names = getattr(layer, "_flat_weights_names", ())
    held = getattr(layer, "_flat_weights", ())
    methods = ("_init_flat_weights", "_update_flat_weights")
    return (
        0 < len(names) == len(held)
        and all(tensor is getattr(layer, name) for name, tensor in zip(names, held, strict=True))
        and all(hasattr(layer, method) for method in methods)
    )
