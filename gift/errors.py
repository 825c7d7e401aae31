"""Errors and warnings of gift, and what their messages share."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar


class GiftWarning(UserWarning):
    """Something that was asked for has no effect, or an effect that surprises."""


class GiftError(Exception):
    """Base of the errors that gift raises where it knows what is wrong.

    Each of them is a ``ValueError`` or a ``RuntimeError`` as well.

    Args:
        what: what cannot be done, and why.
        problems: all that is wrong, one line each; they follow `what` in the message.
    """

    limit: ClassVar[int | None] = None
    """Number of problems to show; None shows all."""

    def __init__(self, what: str, problems: Sequence[str] = ()) -> None:
        lines = list(problems[: self.limit])
        if more := len(problems) - len(lines):
            lines.append(f"and {more} more problems")
        super().__init__("\n  ".join([f"{what}:" if lines else what, *lines]))
        self.problems = list(problems)


class AdaptationError(GiftError, ValueError):
    """A tensor or a module cannot be adapted as asked."""


class DeltaFileError(GiftError, ValueError):
    """A file does not fit a network, or a network cannot be saved."""


class DataError(GiftError, ValueError):
    """Examples that cannot be read or learnt from."""

    limit = 10  # a data set may have a problem on each of its lines


class NetworkError(GiftError, ValueError):
    """A network that cannot be made or loaded by its name."""


class JobError(GiftError, ValueError):
    """A job that cannot be run as it is written."""


class YamlError(GiftError, ValueError):
    """A text that is not YAML, or that needs more than its size.

    Args:
        problems: all that is wrong, each with its line.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class TrainingError(GiftError, RuntimeError):
    """Training cannot start or continue."""


class NotFiniteError(TrainingError):
    """The loss or a gradient is not finite: as a rule, the network has diverged."""


def refuse(error: type[GiftError], what: str, problems: Iterable[str]) -> None:
    """Raise one error that lists all problems, if there are any.

    Args:
        error: class of the error.
        what: what cannot be done, and why.
        problems: one line each.

    Example:
        >>> refuse(DataError, "table.csv", [f"row {row}: no label" for row in range(12)])
        Traceback (most recent call last):
        gift.errors.DataError: table.csv:
          row 0: no label
          ...
          row 9: no label
          and 2 more problems
    """
    if found := list(problems):
        raise error(what, found)


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0]


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def closest(name: Any, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known names, three at most, that resemble one that is not known.

    Args:
        name: the unknown name.
        known: the names that there are.
        cutoff: from 0 to 1; how similar they are at least.

    Example:
        >>> closest("epoch", ["epochs", "lr"]), closest("RATE", ["learning_rate"])
        (['epochs'], ['learning_rate'])
    """
    known, wrong = list(known), str(name)
    if near := get_close_matches(wrong, known, n=3, cutoff=cutoff):
        return near
    small, wrong = {one.lower(): one for one in known}, wrong.lower()
    near = [small[one] for one in get_close_matches(wrong, small, n=3, cutoff=cutoff)]
    return near or [one for one in known if wrong and wrong in one.lower()][:3]
