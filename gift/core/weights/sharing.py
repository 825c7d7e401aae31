"""Parameters of methods that all layers of a network share.

Each module holds the parameter under its own name, and it is one object, as tied weights of torch
are: `parameters()` gives it once, copies and pickles keep it one, and files have it once. Code that
replaces parameters one by one unties it, as it does with tied weights: ``to_empty``,
``load_state_dict(assign=True)``, lazy modules that get their shape. Then it is tied again.
"""

import itertools
from collections import Counter
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gift.core.weights.record import WeightDelta, weight_deltas
from gift.support.sharding import is_sharded


def shares(network: nn.Module) -> bool:
    """Whether a delta in the network has parameters that layers share."""
    return any(
        delta.method.shared
        for module in network.modules()
        for delta in weight_deltas(module).values()
    )


def in_several_modules(network: nn.Module) -> bool:
    """Whether modules hold the same parameter, not just one that could be shared."""
    held = Counter(
        id(module._parameters[delta.names[key]])
        for module in network.modules()
        for delta in weight_deltas(module).values()
        for key in (delta.method.shared if delta.owner is None else ())
    )
    return any(count > 1 for count in held.values())


def share_parameters(network: nn.Module) -> bool:
    """Let all deltas of the present strategy hold the same shared parameters: the first ones.

    Returns:
        Whether some of them have no shape yet.

    Raises:
        RuntimeError: if FSDP2 has put them into different groups, each with its own copy.
    """
    first: dict[Any, Any] = {}
    waits = False
    for module in network.modules():
        for delta in weight_deltas(module).values():
            if delta.owner is not None or delta.of_base:
                continue
            for key in delta.method.shared:
                name = delta.names[key]
                own: Any = module._parameters.get(name)
                if is_lazy(own):
                    waits = True
                elif isinstance(own, nn.Parameter):
                    method = delta.method
                    values = own.shape, own.dtype, own.device
                    place = method.name, method.shares_with, key, *values
                    one = first.setdefault(place, own)
                    if one is not own and is_sharded(own):
                        raise RuntimeError(
                            f"the layers share {key} of {delta.method.name}, and FSDP2 has sharded "
                            "it in several groups: call fully_shard for the whole network alone, "
                            "or use a method without shared parameters"
                        )
                    module._parameters[name] = one
    return waits


def place_parts(network: nn.Module) -> None:
    """Settle which part of a whole each matrix is, where a method needs it and it is unknown.

    The matrices that hold one shared parameter are the parts, in the order of the network.
    """
    wholes: dict[int, list[tuple[nn.Module, str, WeightDelta]]] = {}
    readers = []
    for module in network.modules():
        for tensor, delta in weight_deltas(module).items():
            if delta.of_base or not delta.method.is_part:
                continue
            if delta.layout is None:
                return
            if delta.owner is not None:
                readers.append(delta)
                continue
            one = module._parameters[delta.names[delta.method.shared[0]]]
            wholes.setdefault(id(one), []).append((module, tensor, delta))
    for parts in wholes.values():
        if len(parts) == 1:  # it is the whole, as the method supposes
            continue
        shapes = [delta.layout.matrix for *_, delta in parts if delta.layout is not None]
        sizes = [p[-1].method.share(shape) for p, shape in zip(parts, shapes, strict=True)]
        before = [0, *itertools.accumulate(sizes)]
        for (module, tensor, delta), first in zip(parts, before[:-1], strict=True):
            delta.place(module, tensor, first, before[-1])
    for delta in readers:
        assert delta.owner is not None
        own = weight_deltas(delta.owner).values()
        delta.method = next(other.method for other in own if other.names == delta.names)
