"""Which tensors of a fine-tuned network are trained, which are frozen, which are deltas."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gift.core.delta import added_names
from gift.core.dynamic_class import joined
from gift.core.record import record_of
from gift.core.stack import names_of_levels


def named_trainable(network: nn.Module, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained: chosen by the strategy, or unfrozen later."""
    record = network.__dict__.get("_gift_network")
    chosen = record.chosen if record is not None else ()
    for name, parameter in nn.Module.named_parameters(network, recurse=recurse):
        if parameter.requires_grad or name in chosen:
            yield name, parameter


def trained_of_the_base(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the base that are trained, without deltas."""
    deltas = delta_names(network)
    return ((name, p) for name, p in named_trainable(network) if name not in deltas)


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Everything that a state of a fine-tuned network must contain.

    These are the trained parameters and the persistent buffers of the present strategy's methods;
    a tied one has its first name.
    """
    return {**dict(named_trainable(network)), **dict(_buffers_of_deltas(network, of_base=False))}


def _buffers_of_deltas(network: nn.Module, of_base: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and persistent buffers of deltas: of those of the base, or of the present ones."""
    for path, module in network.named_modules():
        for name in names_of_levels(module, of_base):
            tensor = module._buffers.get(name)
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield joined(path, name), tensor


def moved_buffers(network: nn.Module) -> Iterator[str]:
    """Names of buffers whose values changed since enabling, or may have changed.

    Only persistent buffers that no method added count. Another dtype or device is not a change.
    """
    undo = record_of(network).undo
    before = {id(m._buffers[name]): value for m, name, value in undo.values if name in m._buffers}
    deltas = delta_names(network)
    for path, module in network.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            own = joined(path, name)
            if buffer is None or name in module._non_persistent_buffers_set or own in deltas:
                continue
            value = before.get(id(buffer))
            if value is None or not _same(buffer, value):
                yield own


def _same(buffer: Tensor, before: Tensor) -> bool:
    if buffer.is_meta or before.is_meta:  # no value now, or none when it was saved
        return False
    return buffer.shape == before.shape and torch.equal(buffer, before.to(buffer))


def frozen_names(network: nn.Module) -> list[str]:
    """Names of the tensors that are not trained, including every name of tied ones.

    These are parameters, and the buffers of deltas that belong to the base.
    """
    record = record_of(network)
    names = [
        name
        for name, p in nn.Module.named_parameters(network, remove_duplicate=False)
        if not p.requires_grad and name not in record.chosen
    ]
    if record.below is not None:
        names += dict(_buffers_of_deltas(network, of_base=True))
    return names


def delta_names(network: nn.Module) -> set[str]:
    """Names of the parameters and buffers that methods added."""
    return {
        joined(path, name)
        for path, module in network.named_modules()
        for name in added_names(module)
    }
