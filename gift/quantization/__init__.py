"""Quantised weights, one file for each package.

This package knows nothing of deltas.
"""

from gift.quantization.tensors import (
    as_packed,
    dequantised,
    is_quantised,
    not_yet_quantised,
    packed_names,
    product,
    quant_state_names,
    requantised,
    same_values,
    shape_of,
    stand_in,
    tells_packing,
)

__all__ = [
    "as_packed",
    "dequantised",
    "is_quantised",
    "not_yet_quantised",
    "packed_names",
    "product",
    "quant_state_names",
    "requantised",
    "same_values",
    "shape_of",
    "stand_in",
    "tells_packing",
]
