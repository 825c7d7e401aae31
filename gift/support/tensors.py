"""Small functions on tensors that several packages need."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


_NO_TENSORS = {bool, int, float, str, type(None), set, dict, OrderedDict}


def tensors_among(attributes: Mapping[str, object]) -> list[str]:
    """Names of the attributes that are tensors."""
    if holds_no_tensors(attributes.values()):
        return []
    return [name for name, value in attributes.items() if isinstance(value, Tensor)]


def holds_no_tensors(values: Iterable[object]) -> bool:
    """Whether the classes of all values show that none is a tensor, nor a sequence of tensors."""
    return _NO_TENSORS.issuperset(map(type, values))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in double precision; complex tensors stay complex."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def is_inexact(tensor: Tensor) -> bool:
    """Whether its dtype is floating-point or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_finite(tensor: Tensor) -> bool:
    """Whether it contains no infinity and no NaN."""
    if not is_inexact(tensor):
        return True
    if tensor.element_size() == 1:  # few operations support float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def set_flag(tensor: Tensor, flag: bool) -> None:
    """Set ``requires_grad``, also of tensors that require inference mode for that."""
    if tensor.requires_grad != flag:
        # In torch 2.6, `is_inference` raises for a parameter without shape.
        with torch.inference_mode(not is_lazy(tensor) and tensor.is_inference()):
            tensor.requires_grad = flag


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Set ``tensor.data``, also of tensors that require inference mode for that."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.data = data


def with_data(tensor: Tensor, data: Tensor) -> Tensor:
    """Set ``tensor.data`` and return the tensor, or a new one if torch refuses (meta device)."""
    try:
        set_data(tensor, data)
    except RuntimeError:
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(data, tensor.requires_grad)
        return data
    return tensor


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit; False if that cannot be determined."""
    if type(one.data) is not Tensor or type(other.data) is not Tensor:
        return False
    if (one.shape, one.dtype, one.device, one.layout) != (
        other.shape, other.dtype, other.device, other.layout
    ):  # fmt: skip
        return False
    if one.is_meta or one.layout is not torch.strided:
        return False
    if one.is_complex():
        one, other = (torch.view_as_real(t.detach().resolve_conj()) for t in (one, other))
    bits = _BITS.get(one.element_size())
    return bits is not None and torch.equal(one.detach().view(bits), other.detach().view(bits))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a plain strided tensor with memory and a shape."""
    kind = type(tensor)
    own = kind is nn.Parameter or kind is Tensor or (
        not is_lazy(tensor) and type(tensor.data) is Tensor
    )  # fmt: skip
    return own and tensor.layout is torch.strided and not tensor.is_meta


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of it share memory, so that torch refuses writes into it."""
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def cast_incompatibility(value: Tensor, dtype: torch.dtype) -> str:
    """Why casting a tensor to `dtype` would change its values; empty if it would not."""
    if value.dtype == dtype:
        return ""
    text = f"is {dtype_name(value.dtype)}, expected {dtype_name(dtype)}"
    if value.is_complex() and not dtype.is_complex:
        return f"{text}: its imaginary part would be lost"
    if not (dtype.is_floating_point or dtype.is_complex):
        kept = value.to(dtype).to(value.dtype) if not value.is_floating_point() else None
        return "" if kept is not None and torch.equal(kept, value) else text
    if not (value.is_floating_point() or value.is_complex()):
        return text
    if not is_finite(value.to(dtype)) and is_finite(value):
        return f"{text}: some of its numbers are too large for that"
    return ""
