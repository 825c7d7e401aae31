"""Folding deltas into the weights: for good, or for a while."""

from gift.merging.for_a_while import merged
from gift.merging.for_good import merge

__all__ = ["merge", "merged"]
