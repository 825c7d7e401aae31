"""Effective weights of a module, and writing them into it."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from gift.core.weights.record import present_tensor, trained_value, weight_deltas
from gift.support.tensors import set_data


def effective(module: nn.Module) -> dict[str, Tensor]:
    """The adapted tensors of `module` itself with their deltas, as without dropout.

    A tied tensor whose delta stands elsewhere is told there.
    """
    own = {t: a for t, a in weight_deltas(module).items() if a.owner is None or a.follows}
    own = {t: a for t, a in own.items() if a.layout is not None}  # which lazy ones lack
    return {t: trained_value(a, module, present_tensor(module, t)) for t, a in own.items()}


def write(module: nn.Module, tensor: str, value: Tensor) -> None:
    """Let `module`, which has no deltas any more, hold that value."""
    with torch.no_grad():
        parameter = module._parameters.get(tensor)
        if parameter is not None:
            # Memory of its own, as the present one may be nobody's to write: expanded, or a file
            # that is mapped to be read.
            set_data(parameter, torch.empty_like(parameter.data).copy_(value))
        elif parametrize.is_parametrized(module, tensor):
            setattr(module, tensor, value)
        else:
            _write_normed(module, tensor, value)


def _write_normed(module: nn.Module, tensor: str, value: Tensor) -> None:
    """The same for the hook of the old ``weight_norm``, which computes ``g v / norm(v)``."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == tensor:
            getattr(module, f"{tensor}_v").copy_(value)
            getattr(module, f"{tensor}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
            setattr(module, tensor, hook.compute_weight(module))
            return
    raise ValueError("by a hook that does not say how")
