"""Merge deltas into the weights permanently."""

import warnings
from collections.abc import Iterator
from statistics import mean
from typing import Any

from torch import Tensor, nn

from gift.core.frozen_norms import release_statistics
from gift.core.merging.possible import NOT_MERGED, check, unmergeable
from gift.core.merging.weights import effective, write
from gift.core.network import remove_record
from gift.core.undo.snapshot import transaction
from gift.core.weights.attach import release_tensors
from gift.core.weights.record import weight_deltas
from gift.errors import AdaptationError, GiftWarning, refuse
from gift.quantization import is_quantised, requantised
from gift.support.progress import slow
from gift.support.sharding import is_sharded
from gift.support.threads import changing


@changing
def merge(net: nn.Module) -> nn.Module:
    """Merge the deltas into the weights and return the plain trained network.

    Nothing of gift remains on it, and deltas on top of each other are merged together. Classes,
    names, dtypes and ``requires_grad`` are those of the base. Parameters that were trained in
    place, and new heads, stay. Weights are computed in the precision of the deltas, at least
    float32, and rounded once. Quantised weights are quantised again in the same way; a
    `GiftWarning` reports how far the result is from the deltas. Before anything is changed,
    everything is computed once to find what cannot be merged.

    Args:
        net: a network that is being fine-tuned; it is changed in place.

    Returns:
        `net`, for convenience.

    Raises:
        RuntimeError: if it is not being fine-tuned, or is sharded.
        AdaptationError: naming everything that cannot be merged: wrapped forward passes, values
            that are not finite, computed weights that cannot take every value.

    Example:
        >>> import gift, torch
        >>> from torch import nn
        >>> net, x = nn.Linear(64, 10), torch.randn(2, 64)
        >>> report = gift.enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy())
        >>> _ = nn.init.normal_(net.lora_B)  # in the place of training
        >>> tuned = net(x)
        >>> type(gift.merge(net)), list(net.state_dict())
        (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
        >>> torch.allclose(net(x), tuned, atol=1e-4)
        True
    """
    check(net)
    losses: dict[str, float] = {}
    with transaction(net, writes=_written(net)):
        refuse(AdaptationError, NOT_MERGED, unmergeable(net, losses))
        _warn(losses)  # before merging: it raises where warnings are errors
        _merge(net)
    return net


def _merge(net: nn.Module) -> None:
    record = remove_record(net)
    instead: dict[int, nn.Parameter] = {}
    for module in slow([*net.modules()], "merging"):
        values = effective(module)
        release_tensors(module)
        release_statistics(module)
        for tensor, value in values.items():
            frozen: Any = module._parameters.get(tensor)
            if is_quantised(frozen):
                instead[id(frozen)] = requantised(frozen, value)
            else:
                write(module, tensor, value)
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in instead:
                setattr(module, name, instead[id(parameter)])
    for module, name, flag in record.lowest.undo.requires_grad:
        if (parameter := module._parameters.get(name)) is not None:
            parameter.requires_grad = flag
    for parameter in net.parameters():
        parameter.grad = None


def _warn(losses: dict[str, float]) -> None:
    if losses:
        worst = max(losses, key=losses.__getitem__)
        warnings.warn(
            f"{len(losses)} quantised weights were quantised again with their deltas, which rounds "
            f"the deltas: relative to the delta, the error is {mean(losses.values()):.1%} on "
            f"average and {losses[worst]:.1%} at most ({worst})",
            GiftWarning,
            stacklevel=4,
        )


def _written(net: nn.Module) -> Iterator[Tensor]:
    """Tensors that merging writes to in place.

    These are the tensors from which an adapted weight is computed, and those that are spread over
    processes.
    """
    for module in net.modules():
        adapted: list[Any] = [module._parameters.get(tensor) for tensor in weight_deltas(module)]
        if any(parameter is None for parameter in adapted):
            yield from (*nn.Module.parameters(module), *module.buffers())
        else:
            yield from filter(is_sharded, adapted)
