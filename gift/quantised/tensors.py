"""Quantised weights of all kinds: what they stand for, products with them, quantising again.

No package is imported here: a tensor of a package can be met only where somebody has imported that.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gift.errors import AdaptationError
from gift.quantised import bitsandbytes, torchao
from gift.quantised.rows import QuantisedRow
from gift.weak import known_by_class

QUANTISED: tuple[QuantisedRow, ...] = (*torchao.ROWS, *bitsandbytes.ROWS)

_MARKED = [row for row in QUANTISED if row.mark]

_FAILURES = (RuntimeError, ImportError, AttributeError, AssertionError, ValueError, TypeError)
"""What packages raise where a format or device has no such function."""


def is_quantised(tensor: Any) -> bool:
    """Whether it is a quantised tensor of a kind that is known here."""
    return _row_for(tensor) is not None


def not_yet_quantised(tensor: Any) -> str | None:
    """What must happen to a tensor that will be quantised but is not, in words."""
    cls: type = type(tensor)
    row = _row_of(cls) if isinstance(tensor, Tensor) else None
    return None if row is None or row.holds(tensor) else row.before


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the matrix that a tensor stands for, which may be packed in another one."""
    row = _row_for(tensor)
    return tensor.shape if row is None else row.shape(tensor)


def dequantised(tensor: Tensor, module: Any = None) -> Tensor:
    """What a quantised tensor stands for, in floating point; any other tensor as it is.

    Args:
        tensor: of any kind.
        module: that holds it: a ``Linear8bitLt`` keeps the scales after its first call.

    Raises:
        AdaptationError: if the package cannot do it, here or on this device.
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
    """Whether two tensors of one kind hold the same; most quantised ones cannot be compared."""
    if hasattr(tensor, "__tensor_flatten__"):
        tensor, other = dequantised(tensor), dequantised(other)
    return torch.equal(tensor, other)


def stand_in(tensor: Tensor) -> Tensor:
    """Zeros like what a quantised tensor stands for, which take no memory; others as they are."""
    if not is_quantised(tensor):
        return tensor
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    return torch.zeros((), dtype=dtype, device=tensor.device).expand(shape_of(tensor))


def requantised(tensor: Tensor, value: Tensor) -> nn.Parameter:
    """Another value, quantised as `tensor` is: same type, groups and options.

    Args:
        tensor: a quantised tensor.
        value: of the shape of what `tensor` stands for.

    Returns:
        A frozen parameter.

    Raises:
        AdaptationError: if that cannot be done.
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
    """``W0 x + bias`` by the kernel of the quantised layer, bit for bit what that gives.

    The gradient is that of the product with the matrix for which the tensor stands: some kernels
    have none of their own, and others would keep that matrix for it.
    """
    return _Product.apply(x, bias, tensor, module)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Any, tensor: Tensor, module: Any) -> Tensor:
        ctx.tensor, ctx.module = tensor, module
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        row = _row_for(tensor)
        assert row is not None
        return row.product(tensor, module, x, bias).detach()  # a view would bar writes into it

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
    """Whatever order layers pack their weights in within it, afterwards that is as before.

    Those of bitsandbytes do so in their first inference on a CPU, for a kernel that rounds
    otherwise.
    """
    puts_back = [row.hold(tensor) for tensor in tensors if (row := _row_for(tensor)) is not None]
    try:
        yield
    finally:
        for put_back in puts_back:
            put_back()


def tells_packing(name: str) -> bool:
    """Whether that is the name, in a state, of what tells in which order a weight is packed."""
    return ".quant_state." in name


def quant_state_names(network: Any) -> Iterator[str]:
    """Names in a state of what belongs to quantised tensors and is no parameter or buffer."""
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            if (row := _row_for(parameter)) is not None:
                prefix = f"{path}." if path else ""
                yield from (prefix + stored for stored in row.stored(parameter, module, name))


def _row_for(tensor: Any) -> QuantisedRow | None:
    cls: type = type(tensor)
    row = None
    if cls is nn.Parameter:
        for marked in _MARKED:
            if hasattr(tensor, marked.mark):
                row = marked
                break
    elif cls is not Tensor and isinstance(tensor, Tensor):
        row = _row_of(cls)
    return row if row is not None and row.holds(tensor) else None


@known_by_class
def _row_of(cls: type) -> QuantisedRow | None:
    return next((row for row in QUANTISED if row.matches(cls)), None)
