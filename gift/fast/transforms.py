"""Who else follows what is computed, and does not know autograd functions of one's own."""

import torch


def is_transformed() -> bool:
    """Whether a transform of torch.func, dual numbers or a trace of TorchScript follows."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.autograd.forward_ad._current_level >= 0  # dual numbers, made by hand
    )
