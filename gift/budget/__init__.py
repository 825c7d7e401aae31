"""Ranks for a parameter budget, chosen on a copy of the network without values.

Nothing here trains.
"""

from gift.budget.suggestion import Suggestion as Suggestion
from gift.budget.suggestion import suggest as suggest
