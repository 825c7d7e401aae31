"""Compute the effective weights of a module and write them into it."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import trained_value, weight_deltas
from gift.support.sharding import is_sharded
from gift.support.tensors import set_data


def effective(module: nn.Module) -> dict[str, Tensor]:
    """The adapted tensors of `module` itself with their deltas, without dropout.

    A tied tensor whose delta is held by another module is reported for that module.
    """
    own = {t: a for t, a in weight_deltas(module).items() if a.owner is None or a.bias_of}
    own = {t: a for t, a in own.items() if a.layout is not None}  # None for lazy tensors
    return {t: trained_value(a, module, present_tensor(module, t)) for t, a in own.items()}


def write(module: nn.Module, tensor: str, value: Tensor) -> None:
    """Write a value into a tensor of `module`, which has no deltas any more."""
    with torch.no_grad():
        parameter = module._parameters.get(tensor)
        if parameter is not None and is_sharded(parameter):
            parameter.copy_(value)
        elif parameter is not None:
            # Use new memory: the present memory may be read-only (a mapped file) or expanded.
            set_data(parameter, torch.empty_like(parameter.data).copy_(value))
        elif parametrize.is_parametrized(module, tensor):
            setattr(module, tensor, value)
        else:
            _write_normed(module, tensor, value)


def _write_normed(module: nn.Module, tensor: str, value: Tensor) -> None:
    """Write a tensor of the old ``weight_norm``, whose hook computes ``g v / norm(v)``."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == tensor:
            getattr(module, f"{tensor}_v").copy_(value)
            getattr(module, f"{tensor}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
            setattr(module, tensor, hook.compute_weight(module))
            return
    raise ValueError("by a hook that does not say how")
