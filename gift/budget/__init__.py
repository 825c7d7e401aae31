"""Choose ranks for a parameter budget, on a copy of the network without values.

Nothing in this package trains.
"""

from gift.budget.suggestion import Suggestion as Suggestion
from gift.budget.suggestion import suggest as suggest
