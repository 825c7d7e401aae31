"""Choosing sizes: ranks for a budget, on a copy of the network without values."""

from gift.budget.suggestion import Suggestion as Suggestion
from gift.budget.suggestion import suggest as suggest
