"""Evaluation on the old task: the adapted network with its original heads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gift.core.record import record_of


@contextmanager
def old_heads(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager that puts the modules that the strategy replaced back in place.

    Args:
        net: a network that is being fine-tuned.
        device: device of the network; the old modules are moved there.
    """
    record = record_of(net)
    swapped = []
    for undo in record.undo.modules:
        for name, old in undo.entries.get("_modules", {}).items():
            new = undo.module._modules.get(name)
            if isinstance(old, nn.Module) and new is not None:
                swapped.append((undo.module, name, old.to(device), new))
    try:
        for module, name, old, _ in swapped:
            module._modules[name] = old
        yield
    finally:
        for module, name, _, new in swapped:
            module._modules[name] = new
