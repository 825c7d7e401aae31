"""Quantised weights of all kinds: dequantise, multiply, quantise again.

No package is imported here: a tensor of a package exists only if that package has been imported.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gift.errors import AdaptationError
from gift.quantization import bitsandbytes, torchao
from gift.quantization.rows import QuantisedRow
from gift.support.weak import known_by_class

QUANTISED: tuple[QuantisedRow, ...] = (*torchao.ROWS, *bitsandbytes.ROWS)

_MARKED = [row for row in QUANTISED if row.mark]

_FAILURES = (RuntimeError, ImportError, AttributeError, AssertionError, ValueError, TypeError)
"""The exceptions that packages raise if a format or device lacks a function."""


def is_quantised(tensor: Any) -> bool:
    """Whether the tensor is quantised, in a supported format."""
    return _row_for(tensor) is not None


def not_yet_quantised(tensor: Any) -> str | None:
    """Return what must happen to a tensor that is not quantised yet, in words, or None."""
    cls: type = type(tensor)
    row = _row_of(cls) if isinstance(tensor, Tensor) else None
    return None if row is None or row.holds(tensor) else row.before


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of the matrix that a tensor represents, which may be packed."""
    row = _row_for(tensor)
    return tensor.shape if row is None else row.shape(tensor)


def dequantised(tensor: Tensor, module: Any = None) -> Tensor:
    """Return a quantised tensor in floating point, and any other tensor unchanged.

    Args:
        tensor: a tensor of any kind.
        module: the module that holds it. A ``Linear8bitLt`` keeps the scales after its first call.

    Raises:
        AdaptationError: if the package cannot do it, in general or on this device.
    """
    row = _row_for(tensor)
    if row is None:
        return tensor
    if tensor.is_meta:
        return stand_in(tensor)
    try:
        with torch.no_grad():
            return row.dequantise(tensor, module)
    except _FAILURES as error:
        raise AdaptationError(
            f"a {type(tensor).__name__} on {tensor.device} cannot be dequantised "
            f"({type(error).__name__}: {error}); another format or device may do"
        ) from error


def same_values(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one kind are equal; most quantised tensors have no comparison."""
    if hasattr(tensor, "__tensor_flatten__"):
        tensor, other = dequantised(tensor), dequantised(other)
    return torch.equal(tensor, other)


def stand_in(tensor: Tensor) -> Tensor:
    """Return zeros, without memory, in place of a quantised tensor; others unchanged."""
    if not is_quantised(tensor):
        return tensor
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    return torch.zeros((), dtype=dtype, device=tensor.device).expand(shape_of(tensor))


def requantised(tensor: Tensor, value: Tensor) -> nn.Parameter:
    """Quantise another value as `tensor` is quantised: same type, groups and options.

    Args:
        tensor: a quantised tensor.
        value: the value, in the shape of the matrix that `tensor` represents.

    Returns:
        A frozen parameter.

    Raises:
        AdaptationError: if that is not possible.
    """
    row, refusal = _row_for(tensor), f"a {type(tensor).__name__} cannot be quantised again with it"
    if row is None:
        raise AdaptationError(refusal)
    try:
        with torch.no_grad():
            new = row.requantise(tensor, value)
    except _FAILURES as error:
        raise AdaptationError(f"{refusal} ({type(error).__name__}: {error})") from error
    if new is None:
        raise AdaptationError(refusal)
    return new if isinstance(new, nn.Parameter) else nn.Parameter(new, requires_grad=False)


def product(tensor: Tensor, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``W0 x + bias`` with the kernel of the quantised layer, bit-identical to it.

    The gradient is that of the product with the dequantised matrix: some kernels have no gradient,
    and others would save that matrix for it.
    """
    return _Product.apply(x, bias, tensor, module)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Any, tensor: Tensor, module: Any) -> Tensor:
        ctx.tensor, ctx.module = tensor, module
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        row = _row_for(tensor)
        assert row is not None
        return row.product(tensor, module, x, bias).detach()  # a view would forbid in-place writes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (dtype, bias_dtype) = gradients, ctx.dtypes
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            matrix = dequantised(ctx.tensor, ctx.module)
            of_x = (gradient @ matrix.to(gradient.dtype)).to(dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0).to(bias_dtype)
        return of_x, of_bias, None, None


@contextmanager
def as_packed(tensors: Iterable[Any]) -> Iterator[None]:
    """Context manager that restores the memory order of weights which layers repack within it.

    Layers of bitsandbytes repack in their first inference on a CPU, for a kernel that rounds
    differently.
    """
    puts_back = [row.hold(tensor) for tensor in tensors if (row := _row_for(tensor)) is not None]
    try:
        yield
    finally:
        for put_back in puts_back:
            put_back()


def tells_packing(name: str) -> bool:
    """Whether a name in a state belongs to the record of a weight's packing."""
    return ".quant_state." in name


def packed_names(names: Collection[str]) -> tuple[set[str], set[str]]:
    """From the names in a state, tell those of packed weights, and of the records of packing.

    bitsandbytes stores records of 4-bit weights below the name of the weight, and scales of 8-bit
    ones beside it.
    """
    records = {name for name in names if name.rpartition(".")[2] in ("SCB", "weight_format")}
    weights = {name.rpartition(".")[0] + ".weight" for name in records}
    known = set(names)
    for name in known:
        parents = name.split(".")
        above = (".".join(parents[:count]) for count in range(1, len(parents)))
        if (weight := next((parent for parent in above if parent in known), None)) is not None:
            records.add(name)
            weights.add(weight)
    return {weight.removeprefix(".") for weight in weights}, records


def quant_state_names(network: Any) -> Iterator[str]:
    """Yield the state names of parts of quantised tensors that are not parameters or buffers."""
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            if (row := _row_for(parameter)) is not None:
                prefix = f"{path}." if path else ""
                yield from (prefix + stored for stored in row.stored(parameter, module, name))


def _row_for(tensor: Any) -> QuantisedRow | None:
    cls: type = type(tensor)
    row = None
    if cls is nn.Parameter:
        for marked in _MARKED:  # the compiler traces this: it knows `hasattr`, not `vars`
            if hasattr(tensor, marked.mark):
                row = marked
                break
    elif cls is not Tensor and isinstance(tensor, Tensor):
        row = _row_of(cls)
    return row if row is not None and row.holds(tensor) else None


@known_by_class
def _row_of(cls: type) -> QuantisedRow | None:
    return next((row for row in QUANTISED if row.matches(cls)), None)
