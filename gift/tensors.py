"""What several parts ask of tensors."""

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in double precision, complex if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def is_inexact(tensor: Tensor) -> bool:
    """Whether its numbers are floating-point, or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_finite(tensor: Tensor) -> bool:
    """Whether no number in it is infinite or none."""
    if not is_inexact(tensor):
        return True
    if tensor.element_size() == 1:  # float8 has few operations of its own
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
