"""What all formats check of the tensors that they write."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gift.support.tensors import is_finite


def dtype_problems(dtype: Any) -> Iterator[str]:
    """Yield why files cannot have tensors of that dtype; None keeps the tensors' own."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        yield f"dtype is {dtype!r}, expected a floating-point torch dtype"


def value_problems(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Iterator[str]:
    """Yield which tensors are not finite, perhaps because they were cast to `dtype`."""
    if bad := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        yield f"not finite{f' in {dtype}' * bool(dtype)}: {', '.join(bad)}"
