"""Reporting all problems with examples in one error."""

from collections.abc import Sequence

from gift.errors import DataError


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one error for all problems, if there are any.

    Args:
        what: a few words that say where they were found.
        problems: one line each.

    Raises:
        DataError: if there are problems.

    Example:
        >>> refuse("table.csv", [f"row {row}: no label" for row in range(12)])
        Traceback (most recent call last):
        gift.errors.DataError: table.csv:
          row 0: no label
          ...
          row 9: no label
          and 2 more problems
    """
    if problems:
        raise DataError(what, problems, limit=10)
