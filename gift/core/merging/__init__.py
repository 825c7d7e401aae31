"""Merge deltas into the weights, permanently or temporarily. No file formats."""

from gift.core.merging.for_a_while import merged
from gift.core.merging.for_good import merge

__all__ = ["merge", "merged"]
