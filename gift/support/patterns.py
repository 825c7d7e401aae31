"""Bound the time that regular expressions from untrusted files may take.

`re` tries one way to match after another, and has no limit of time: ``(a+)+b`` needs 2^n steps for
a name of n letters. The number of ways bounds the steps, and the structure of an expression bounds
the number of ways: parts in a row multiply theirs, alternatives add theirs, and a repetition has
one for each count.
"""

import re
from collections.abc import Iterable
from typing import Any

from gift.private.python import parsed_pattern

LONGEST_NAME = 99
"""Length of names for which ways are counted."""
MOST_WAYS = 1e8
"""Four repetitions in a row, as in ``.*a.*b.*c.*``; all expressions of a file add up."""


def ways(pattern: str) -> float:
    """Bound the ways in which `re` can try to match a pattern at one place of a name.

    Raises:
        re.error, RecursionError, OverflowError: if it is not a valid pattern.

    Example:
        >>> ways(r"layers\\.(query|value)"), ways(r".*\\.attn"), ways(r"(a+)+b")
        (2.0, 100.0, inf)
    """
    return _of_all(parsed_pattern(pattern))


def _of_all(parts: Iterable[tuple[str, Any]] | None) -> float:
    """Ways of parts in a row."""
    if parts is None:
        return float("inf")
    total = 1.0
    for name, value in parts:
        total *= _of_one(name, value)
    return total


def _of_one(name: str, value: Any) -> float:
    if name in _SINGLE:
        return 1.0
    if name == "BRANCH":
        return sum(map(_of_all, value[1]))
    if name == "SUBPATTERN":
        return _of_all(value[-1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return 1.0 + _of_all(value[1])
    if name == "ATOMIC_GROUP":
        return _of_all(value)
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, parts = value
        return _repeated(_of_all(parts), min(int(least), LONGEST_NAME), int(most))
    return float("inf")  # what looks back to a group, and what later versions add


_SINGLE = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY", "RANGE", "FAILURE"}


def _repeated(one: float, least: int, most: int) -> float:
    most = max(least, min(most, LONGEST_NAME))
    if one == 1:
        return most - least + 1.0
    return float("inf") if most > 20 else sum(one**count for count in range(least, most + 1))


def problem_of_patterns(patterns: Iterable[str]) -> str:
    """Say which pattern cannot be read, or may take too long; empty if all can be matched."""
    counts: dict[str, float] = {}
    for pattern in patterns:
        try:
            counts[pattern] = ways(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{_shown(pattern)} is not a regular expression: {error}"
    if sum(counts.values()) <= MOST_WAYS:
        return ""
    return (
        f"the regular expression {_shown(max(counts, key=counts.__getitem__))} may take too long "
        "to match: repetitions (*, +, {n,m}) of what has repetitions or alternatives, many in a "
        "row, and references to groups are not read from files; name the modules instead"
    )


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:60] + "...")
