"""Errors and warnings: what cannot be done as asked, what surprises, and how errors are told."""

from collections.abc import Sequence


class GiftWarning(UserWarning):
    """Something that was asked for had no effect, or an effect that surprises."""


class AdaptationError(ValueError):
    """A tensor cannot be adapted as asked; the message says why and what would work."""


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0]


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
