"""Find out what can be merged and with what loss, without changing anything."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.dynamic_class import joined, plain_class, set_class
from gift.core.forwards import named_forward_deltas
from gift.core.merging.weights import effective, write
from gift.core.undo.frames import OWN
from gift.core.undo.undoable import check_undoable
from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import weight_deltas
from gift.errors import AdaptationError
from gift.quantization import dequantised, is_quantised, requantised
from gift.support.sharding import is_fully_sharded
from gift.support.tensors import is_finite

NOT_MERGED = "nothing was merged, the network is unchanged"


def check(net: nn.Module) -> None:
    """Check that `net` is being fine-tuned and not sharded.

    Raises:
        RuntimeError: if it is not being fine-tuned, or is sharded.
    """
    check_undoable(net, needs_base=False)
    away = any(
        delta.is_away(module._parameters.get(tensor))
        for module in net.modules()
        for tensor, delta in weight_deltas(module).items()
    )
    if away or is_fully_sharded(net):
        raise RuntimeError("the network is sharded: load its delta into a fresh one and merge that")


def unmergeable(net: nn.Module, losses: dict[str, float]) -> Iterator[str]:
    """What cannot be merged permanently, with the reason; tied tensors once.

    Args:
        net: the network.
        losses: receives, for each quantised weight, the error of quantising it with its delta.
    """
    for path, _, wrapper in named_forward_deltas(net):
        if wrapper.names:
            where = path or "the network"
            yield f"{where} is wrapped by {wrapper.method}, which does not change a weight"
    for path, module in net.named_modules():
        values = effective(module)
        yield from without_values(path, module, values)
        for tensor, value in values.items():
            parameter = module._parameters.get(tensor)
            if is_quantised(parameter):
                try:
                    losses[joined(path, tensor)] = _loss(parameter, value, module)
                except AdaptationError as error:
                    yield f"{joined(path, tensor)}: {error}"
            elif parameter is not None or value.is_meta or not is_finite(value):
                continue
            elif why := _unsettable(module, tensor, value.to(_double(value))):
                yield f"{joined(path, tensor)}: {why}"


def _loss(frozen: Any, value: Tensor, module: nn.Module) -> float:
    """Distance from `value` after quantising it, relative to the norm of the delta."""
    new = requantised(frozen, value)
    change = (value - dequantised(frozen, module)).norm()
    return float(
        (dequantised(new, module).to(value.device) - value).norm() / change.clamp(min=1e-30)
    )


def without_values(path: str, module: nn.Module, values: dict[str, Tensor]) -> Iterator[str]:
    """Effective tensors of `module` that have no usable values, each with the reason."""
    for tensor in weight_deltas(module):
        frozen: Any = module._parameters.get(tensor)
        value = values.get(tensor)
        if is_lazy(frozen):
            why = "has no shape yet: run a batch through the network first"
        elif value is None:
            continue
        elif value.is_meta:
            why = "is on the meta device and has no values"
        elif not is_finite(value):
            why = "has merged values that are not finite"
        else:
            continue
        yield f"{joined(path, tensor)} {why}"


def _unsettable(module: nn.Module, tensor: str, value: Tensor) -> str | None:
    """Why a computed tensor cannot be set to a value, or None if it can.

    The write is tried on a copy in double precision, so the remaining error is not due to rounding.
    """
    twin = _plain_twin(module)
    try:
        write(twin, tensor, value)
        left = (present_tensor(twin, tensor) - value).abs().max()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"it is computed, and cannot be set ({error}): make it plain first"
    return None if left <= 1e-5 * value.abs().max() else _COMPUTED


_COMPUTED = (
    "it is computed (by a parametrization, pruning, a hook) in a way that cannot give every value: "
    "make it plain first (remove_parametrizations, prune.remove)"
)


def _plain_twin(module: nn.Module) -> nn.Module:
    """A copy of `module` in double precision, without its children and deltas."""
    state = vars(module)
    children = (m for name, m in module._modules.items() if name != "parametrizations")
    memo: dict[int, Any] = {id(child): nn.Module() for child in children}
    memo |= {id(state[key]): None for key in OWN if key in state}
    # deepcopy refuses a tensor that a hook computed, as it is not a leaf of the graph.
    memo |= {id(value): value.detach() for value in state.values() if isinstance(value, Tensor)}
    twin = copy.deepcopy(module, memo)
    for key in OWN:
        vars(twin).pop(key, None)
    set_class(twin, plain_class(type(module)))
    return twin.double()


def _double(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float64)
