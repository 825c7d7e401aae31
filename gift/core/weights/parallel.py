"""Adapted weights that tensor parallelism spreads over the processes of a mesh.

A weight is cut along its rows or its columns, or every process has a copy of it. The parameters of
a delta that have an axis along the cut are cut with it, so that each process can compute its part
of the effective weight from what it holds. Nothing more is communicated in a forward pass than for
the frozen weight. A parameter without such an axis is replicated. Each process computes the
gradient for its part of the weight, and the backward pass adds these up: one all-reduce of the size
of the parameter.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.weights.making import WeightMaking
from gift.errors import AdaptationError
from gift.layers.layouts import Layout
from gift.methods import Method
from gift.quantization import is_quantised
from gift.support.sharding import distributed, is_sharded, joined_parts, local

Placements = tuple[Any, ...]


def placements_beside(
    method: Method, layout: Layout, placements: Placements
) -> Mapping[str, Placements]:
    """Where the parameters of a method lie beside a weight with these placements.

    Raises:
        AdaptationError: if the method cannot be computed for a part of the weight.
    """
    found = _beside if torch.compiler.is_compiling() else _known_beside
    return found(method, layout, placements)


def _beside(method: Method, layout: Layout, placements: Placements) -> Mapping[str, Placements]:
    from torch.distributed.tensor import Replicate, Shard

    cuts = [_cut(method, layout, placement) for placement in placements]
    return {
        name: tuple(
            Replicate() if cut is None or (axis := axes[cut]) is None else Shard(axis)
            for cut in cuts
        )
        for name, axes in method.split_axes.items()
    }


_known_beside = lru_cache(maxsize=512)(_beside)


def _cut(method: Method, layout: Layout, placement: Any) -> int | None:
    """The axis of the matrix that is cut: 0 for rows, 1 for columns, None for none."""
    from torch.distributed.tensor import Shard

    if placement.is_replicate():
        return None
    if type(placement) is not Shard:
        raise AdaptationError(f"it is spread as {placement}, expected a Shard or a Replicate")
    if layout.axes is None:
        raise AdaptationError(
            f"it is cut along axis {placement.dim} of {layout.shape}, which is none of the matrix "
            f"{layout.matrix}: only weights that are matrices can be both cut and adapted"
        )
    cut = layout.axes[placement.dim]
    if (part := ("rows", "columns")[cut]) not in method.split_by:
        raise AdaptationError(
            f"tensor parallelism cuts its {part} ({placement}), and {method.name} needs all of "
            "them in each process: choose another method (lora), or leave this weight out"
        )
    return cut


def placements_of(
    method: Method, layout: Layout, placements: Placements, names: Iterable[str]
) -> Mapping[str, Placements]:
    """As `placements_beside`, for these parameters of the method.

    Raises:
        AdaptationError: also for a parameter of which the method does not say how it is cut.
    """
    beside = placements_beside(method, layout, tuple(placements))
    if unknown := sorted({*names} - beside.keys()):
        raise AdaptationError(
            f"tensor parallelism spreads it, and {method.name} does not say how to cut {unknown}: "
            "choose another method (lora), or leave this weight out"
        )
    return beside


def spread_parameters(
    method: Method, layout: Layout, frozen: Any, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The initial parameters of a delta, spread to suit the frozen weight.

    Raises:
        AdaptationError: naming a parameter of which the method does not say how it is cut.
    """
    beside = placements_of(method, layout, frozen.placements, values)
    if is_quantised(frozen.to_local()):
        raise AdaptationError(
            "it is quantised and tensor parallelism spreads it: one of the two only, as quantised "
            "weights are read whole"
        )
    return {
        name: _as_given(value, distributed(value.detach(), frozen.device_mesh, beside[name]))
        for name, value in values.items()
    }


def _as_given(value: Tensor, spread: Tensor) -> Tensor:
    """A spread tensor as a buffer, if the given tensor is one."""
    if isinstance(value, nn.Buffer):
        return nn.Buffer(spread, persistent=value.persistent)
    return spread


def local_parameters(
    method: Method,
    layout: Layout,
    frozen: Any,
    parameters: Mapping[str, Any],
    partial: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """The parts of the parameters that this process computes with.

    Args:
        method: the method.
        layout: the layout of the whole weight.
        frozen: the weight, or this process's part of it.
        parameters: the parameters of the delta.
        partial: for each axis of the mesh, whether the processes along it compute different parts
            of the gradient; None means where the weight is cut.
    """
    if not is_sharded(frozen):  # transformers shows its layers local tensors in inference
        return {n: p.to_local() if is_sharded(p) else p for n, p in parameters.items()}
    beside = placements_beside(method, layout, frozen.placements)
    if partial is None:
        partial = [not placement.is_replicate() for placement in frozen.placements]
    return {
        name: local(value, beside[name], partial) if is_sharded(value) else value
        for name, value in parameters.items()
    }


def spread_weight(
    method: Any,
    layout: Layout,
    frozen: Any,
    parameters: Mapping[str, Tensor],
    training: bool,
    of_bias: bool = False,
) -> Tensor:
    """The effective weight or bias, spread as the frozen one is, of which each computes a part."""
    parts = local_parameters(method, layout, frozen, parameters)
    own = frozen.to_local() if is_sharded(frozen) else frozen
    if method.dropout and training:
        parts = method.drop(parts, layout.input_axis)
    making = WeightMaking(layout.of_part(own.shape), method, tuple(parts), of_bias)
    made = making(own, *parts.values())
    if not is_sharded(frozen):
        return made
    return joined_parts(made, frozen.device_mesh, frozen.placements, frozen.shape)
