"""The `requires_grad` flags of parameters, and their values before a schedule was attached."""

from collections.abc import Iterable

from torch import nn

from gift.core.dynamic_class import spec_of
from gift.core.frozen_base import hold_flags
from gift.core.frozen_norms import release_statistics
from gift.core.record import record_of


def set_flags(parameters: Iterable[nn.Parameter], flag: bool) -> None:
    """Freeze or train parameters that no strategy manages."""
    for parameter in parameters:
        parameter.requires_grad = flag
        if not flag:
            parameter.grad = None  # an optimizer would keep using it


def remember(holder: nn.Module, net: nn.Module) -> None:
    """Record on a network which parameters are trained, for `release`; copies keep the record."""
    flags = [
        (module, name, parameter.requires_grad)
        for module in net.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    holder.__dict__["_gift_schedule"] = {"flags": flags, "still": []}


def release(holder: nn.Module) -> None:
    """Remove a schedule: restore flags and norm layers; parameter values stay as they are."""
    noted = holder.__dict__.pop("_gift_schedule", None)
    if noted is None:
        return
    for layer in noted["still"]:
        release_statistics(layer)
    for module, name, flag in noted["flags"]:
        if (parameter := module._parameters.get(name)) is not None:
            parameter.requires_grad = flag
    if spec_of(holder).network:
        record_of(holder).waiting.clear()
        hold_flags(holder)
