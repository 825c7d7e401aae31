"""bitsandbytes: packed parameters, and the layers that compute with them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gift.quantization.rows import QuantisedRow, times_one


def _multiply_4bit(tensor: Any, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    from bitsandbytes import matmul_4bit

    dtype = getattr(layer, "compute_dtype", None)
    if not getattr(layer, "compute_type_is_set", True) and x.dtype != torch.float16:
        dtype = x.dtype  # as the layer decides in its first call
    work = x if dtype is None else x.to(dtype)
    if bias is not None:
        bias = bias.to(work.dtype)
    packed = tensor if _is_packed_for_cpu(tensor) else tensor.t()
    return matmul_4bit(work, packed, bias=bias, quant_state=tensor.quant_state).to(x.dtype)


def _is_packed_for_cpu(tensor: Any) -> bool:
    """Whether the tensor has the memory order of the CPU's own kernel.

    The layer converts to it in its first inference call, and only that kernel can read it.
    """
    return bool(getattr(tensor.quant_state, "packing_format_for_cpu", False))


def _hold_4bit(tensor: Any) -> Callable[[], None]:
    data, state = tensor.data, tensor.quant_state
    known = dict(vars(state))

    def put_back() -> None:
        tensor.data, tensor.quant_state = data, state
        vars(state).clear()
        vars(state).update(known)

    return put_back


def _dequantise_4bit(tensor: Any, layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = tensor.quant_state
    if _is_packed_for_cpu(tensor):
        return times_one(_multiply_4bit, tensor, None, state.shape[-1], state.dtype)
    return dequantize_4bit(tensor.data, state)


def _requantise_4bit(tensor: Any, value: Tensor) -> Tensor:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    old = tensor.quant_state
    options = {
        "blocksize": old.blocksize,
        "compress_statistics": getattr(old, "original_nested", old.nested),
        "quant_type": old.quant_type,
        "quant_storage": tensor.quant_storage,
    }
    dtype = getattr(old, "original_dtype", old.dtype)
    data, state = quantize_4bit(value.to(dtype).contiguous(), **options)
    held = {"quant_state": state, "module": tensor.module, "bnb_quantized": True}
    return Params4bit(data, requires_grad=False, **held, **options)


def _multiply_8bit(tensor: Any, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    from bitsandbytes import matmul

    state = copy.copy(layer.state)  # a copy, since this call writes results into it
    state.CB, state.SCB = tensor.data, _scales(tensor, layer)
    state.is_training = layer.training
    if bias is not None:
        bias = bias.to(x.dtype)
    return matmul(x, tensor.data, bias=bias, state=state)


def _scales(tensor: Any, layer: Any) -> Tensor:
    """Return the largest absolute value of each row; after its first call the layer has it."""
    if tensor.SCB is not None:
        return tensor.SCB
    scales = layer.state.SCB if layer is not None else None
    if scales is None:
        raise RuntimeError("its scales are gone: they are in the layer that held it")
    return scales


def _dequantise_8bit(tensor: Any, layer: Any) -> Tensor:
    return tensor.data.float() * (_scales(tensor, layer).float().unsqueeze(-1) / 127)


def _requantise_8bit(tensor: Any, value: Tensor) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    data, scales, _ = int8_vectorwise_quant(value.to(torch.float16).contiguous())
    return Int8Params(data, requires_grad=False, CB=data, SCB=scales)


ROWS = (
    QuantisedRow(
        ("bitsandbytes.nn.modules.Params4bit",),
        _dequantise_4bit,
        _multiply_4bit,
        _requantise_4bit,
        shape=lambda tensor: torch.Size(tensor.quant_state.shape),
        holds=lambda tensor: tensor.quant_state is not None,
        before="move the network to its device, which quantises it",
        mark="quant_state",
        hold=_hold_4bit,
        stored=lambda tensor, module, name: [
            f"{name}.{key}" for key in tensor.quant_state.as_dict(packed=True)
        ],
    ),
    QuantisedRow(
        ("bitsandbytes.nn.modules.Int8Params",),
        _dequantise_8bit,
        _multiply_8bit,
        _requantise_8bit,
        holds=lambda tensor: tensor.dtype == torch.int8,
        before="make the layer with has_fp16_weights=False, and move the network to its device",
        mark="SCB",
        stored=lambda tensor, module, name: ["SCB", "weight_format"],
    ),
)
