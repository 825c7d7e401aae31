"""Many runs of one job: searching settings, comparing methods, sending jobs to a cluster."""

from gift.many.comparing import compare
from gift.many.comparison import Comparison
from gift.many.searching import Found, search
from gift.many.settings import Search, read_search
from gift.many.submitting import submit

__all__ = ["Comparison", "Found", "Search", "compare", "read_search", "search", "submit"]
