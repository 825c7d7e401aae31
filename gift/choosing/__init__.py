"""Choosing sizes: ranks for a budget, on a copy of the network without values."""

from gift.choosing.suggestion import Suggestion as Suggestion
from gift.choosing.suggestion import suggest as suggest
