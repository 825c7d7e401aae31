"""Checking and interpreting the tensors of one layer in a kohya file."""

from dataclasses import replace

import torch
from torch import Tensor

from gift.interop.kohya.forms import KohyaMethod, Parts, ReadDelta, trimmed
from gift.interop.kohya.layers import Incompatible, Target
from gift.interop.kohya.methods import KOHYA_METHODS
from gift.methods.settings import at_least_32_bits
from gift.support.tensors import is_finite

_NUMBERS = {"alpha", "on_input"}
_VECTORS = {"diff_b", "weight"}


def interpret(parts: Parts, target: Target) -> ReadDelta:
    """Convert the tensors of one layer to a delta.

    Args:
        parts: tensors by their names after the layer's, such as ``lora_up.weight``.
        target: the layer.

    Raises:
        Incompatible: naming everything that is wrong.
    """
    method = _method_of(parts)
    problems = [text for name in parts if (text := _unusable(name, parts[name]))]
    if problems:
        raise Incompatible(*problems)
    wanted = method.shapes(parts, target)
    problems = [
        f"{name} has shape {list(parts[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if trimmed(parts[name].shape) != trimmed(shape)
    ]
    if problems:
        raise Incompatible(*problems)
    clean = {
        name: parts[name].to(at_least_32_bits(parts[name].dtype)).reshape(shape)
        for name, shape in wanted.items()
    }
    found = method.read(clean, _scaling(method, parts), target)
    dtype = at_least_32_bits(target.weight.dtype)
    values = {name: value.to(dtype) for name, value in found.values.items()}
    if not all(map(is_finite, values.values())):
        raise Incompatible(f"its values overflow in {dtype}")
    return replace(found, settings=found.settings | {"conv_layout": "out_as_h"}, values=values)


def _method_of(parts: Parts) -> KohyaMethod:
    """Return the method whose tensors are all present, without others."""
    if "oft_blocks" in parts:
        raise Incompatible(
            "diag-OFT and BOFT of LyCORIS rotate outputs, OFT and BOFT of gift rotate inputs"
        )
    unknown = sorted(set(parts) - {"alpha"}.union(*(method.names for method in KOHYA_METHODS)))
    if unknown:
        read = (f"{method.title} ({', '.join(sorted(method.names))})" for method in KOHYA_METHODS)
        raise Incompatible(
            f"it has {', '.join(unknown)}, which gift does not read: it reads {'; '.join(read)}"
        )
    marked = [method for method in KOHYA_METHODS if set(parts) & method.marks]
    if len(marked) != 1:
        methods = " and ".join(method.title for method in marked) or "no method"
        raise Incompatible(f"it has tensors of {methods}: {sorted(parts)}")
    method = marked[0]
    if foreign := sorted(set(parts) - method.names - {"alpha"}):
        raise Incompatible(
            f"it has {', '.join(foreign)} along with {method.title}; gift has no such method"
        )
    if not any(choice <= set(parts) for choice in method.choices):
        missing = min((choice - set(parts) for choice in method.choices), key=len)
        raise Incompatible(f"{', '.join(sorted(missing))} is missing")
    optional = method.optional | {"alpha"}
    extra = min((set(parts) - c - optional for c in method.choices if c <= set(parts)), key=len)
    if extra:
        raise Incompatible(
            f"it has {', '.join(sorted(extra))}, but not all tensors that belong to it"
        )
    return method


def _unusable(name: str, tensor: Tensor) -> str | None:
    # Some programs write alpha as an integer.
    whole = name in _NUMBERS and tensor.dtype in (torch.int32, torch.int64)
    if not (tensor.is_floating_point() or whole):
        return f"{name} is {tensor.dtype}, expected floating-point numbers"
    if name in _NUMBERS and tensor.numel() != 1:
        return f"{name} has shape {list(tensor.shape)}, expected one number"
    axes, least = (1, "one axis") if name in _VECTORS else (2, "two axes")
    if name not in _NUMBERS and (tensor.ndim < axes or tensor.numel() == 0):
        return f"{name} has shape {list(tensor.shape)}, expected at least {least}, none empty"
    if not is_finite(tensor):
        return f"{name} is not finite"
    return None


def _scaling(method: KohyaMethod, parts: Parts) -> float:
    """Return ``alpha / dim``; 1 without alpha, and for LoKr without low-rank factors."""
    dims = {name: parts[name].shape[axis] for name, axis in method.dims if name in parts}
    if "alpha" not in parts or not dims:
        return 1.0
    if len(set(dims.values())) > 1:
        raise Incompatible(f"its alpha is relative to one rank, its factors have {dims}")
    alpha = float(parts["alpha"])
    if alpha == 0:
        raise Incompatible(
            "alpha is 0, which some programs read as no delta and others as no scaling"
        )
    return alpha / next(iter(dims.values()))
