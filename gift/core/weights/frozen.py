"""The own tensors of a module, which are frozen: not the effective ones that others read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import plain_class


def plain_tensor(module: nn.Module, tensor: str) -> Any:
    """The own tensor of `module`, not the effective one: a parameter, a computed one, or None."""
    value = module._parameters.get(tensor)
    if value is None:
        value = module.__dict__.get(tensor)
    if value is None:
        computed = getattr(plain_class(type(module)), tensor, None)
        value = computed.fget(module) if isinstance(computed, property) else None  # type: ignore[misc]
    return value


def present_tensor(module: nn.Module, tensor: str) -> Any:
    """The own tensor of `module`, not the effective one, computed again if necessary.

    A hook computes a tensor before each forward pass. Its last result may be outdated, because
    other values of its inputs may have been loaded since.
    """
    parameter = module._parameters.get(tensor)
    if parameter is not None:
        return parameter
    with looking(module), torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "name", None) == tensor and hasattr(hook, "compute_weight"):
                still = {"do_power_iteration": False} if hasattr(hook, "n_power_iterations") else {}
                return hook.compute_weight(module, **still)
            mask = getattr(module, f"{tensor}_mask", None)
            if mask is not None and hasattr(hook, "apply_mask"):  # pruned
                whole = getattr(module, f"{tensor}_orig")
                return mask.to(whole.dtype) * whole
        return plain_tensor(module, tensor)


@contextmanager
def looking(module: nn.Module) -> Iterator[None]:
    """Context in which reading a computed tensor changes nothing.

    In training mode, a spectral norm updates its estimate at each read.
    """
    computing = module._modules.get("parametrizations")
    parts = list(computing.modules()) if computing is not None else []
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


class Source(NamedTuple):
    """A frozen tensor from which parameters were derived.

    Args:
        tensor: its name.
        memory: the address of its values.
        derived: the id of the derived parameter.
    """

    tensor: str
    memory: int
    derived: int

    def is_of(self, frozen: Tensor) -> bool:
        """Whether `frozen` is that tensor and needs no gradient."""
        try:
            return frozen.data_ptr() == self.memory and not frozen.requires_grad
        except RuntimeError:  # tensors of function transforms have no memory
            return False


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of torch itself, of no subclass but `nn.Parameter`."""
    return type(tensor) in (Tensor, nn.Parameter)
