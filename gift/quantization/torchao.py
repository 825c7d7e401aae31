"""torchao: tensor subclasses that torch's own layers hold."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gift.quantization.rows import QuantisedRow, times_one


def _multiply(tensor: Any, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, tensor, bias)


def _dequantise_torchao(tensor: Any, module: Any) -> Tensor:
    if type(tensor).dequantize is Tensor.dequantize:  # the class does not implement it
        return times_one(_multiply, tensor, module, tensor.shape[-1], tensor.dtype)
    scales = getattr(tensor, "act_pre_scale", None)  # the kernel multiplies its input by these
    return tensor.dequantize() if scales is None else tensor.dequantize() * scales


def _requantise_torchao(tensor: Any, value: Tensor) -> Tensor | None:
    quantise = _TORCHAO.get(type(tensor).__name__)
    return None if quantise is None else quantise(tensor, value.to(tensor.dtype).contiguous())


def _granularity(tensor: Any) -> Any:
    from torchao.quantization import PerGroup, PerTensor

    whole = tuple(tensor.block_size) == tuple(tensor.shape)
    return PerTensor() if whole else PerGroup(tensor.block_size[-1])


def _mapping(tensor: Any) -> Any:
    from torchao.quantization import MappingType

    shifted = tensor.zero_point is not None and bool(tensor.zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC


def _int8(tensor: Any, value: Tensor) -> Tensor | None:
    if tensor.act_pre_scale is not None:
        return None  # the scale was fitted to the activations together with the weight
    options = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
    kept = {name: getattr(tensor, name) for name in options if hasattr(tensor, name)}
    return type(tensor).from_hp(value, _granularity(tensor), _mapping(tensor), **kept)


def _intx(tensor: Any, value: Tensor) -> Tensor:
    return type(tensor).from_hp(
        value,
        tensor.block_size,
        tensor.target_dtype,
        mapping_type=_mapping(tensor),
        activation_quantization=tensor.activation_quantization,
    )


def _int4(tensor: Any, value: Tensor) -> Tensor | None:
    if getattr(tensor, "act_pre_scale", None) is not None:
        return None
    kept = {n: getattr(tensor, n) for n in ("activation_dtype",) if hasattr(tensor, n)}
    return type(tensor).from_hp(value, list(tensor.block_size), **kept)


def _float8(tensor: Any, value: Tensor) -> Tensor | None:
    if getattr(tensor, "act_pre_scale", None) is not None:
        return None
    from torchao.quantization import PerRow, PerTensor

    rows = (1,) * (value.ndim - 1) + (value.shape[-1],)
    granularity = {rows: PerRow(), tuple(value.shape): PerTensor()}.get(tuple(tensor.block_size))
    if granularity is None:
        return None
    kept = {n: getattr(tensor, n) for n in ("mm_config", "act_quant_kwargs", "kernel_preference")}
    return type(tensor).from_hp(value, tensor.qdata.dtype, granularity, **kept)


_TORCHAO: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "Int4Tensor": _int4,
    "Int4OpaqueTensor": _int4,
    "Int4PlainInt32Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
}


def _requantise_nf4(tensor: Any, value: Tensor) -> Tensor:
    value = value.to(tensor.dtype).contiguous()
    return type(tensor).from_tensor(value, tensor.block_size, tensor.scaler_block_size)


ROWS = (
    QuantisedRow(
        ("torchao.utils.TorchAOBaseTensor",),
        _dequantise_torchao,
        _multiply,
        _requantise_torchao,
    ),
    QuantisedRow(
        ("torchao.quantization.NF4Tensor", "torchao.dtypes.nf4tensor.NF4Tensor"),
        lambda tensor, module: tensor.get_original_weight(),
        _multiply,
        _requantise_nf4,
    ),
)
