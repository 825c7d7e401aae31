"""Targets from labels that are texts: classes, numbers, or several classes at once."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gift.data.classes import classes_of, numbers_of
from gift.data.examples import Examples
from gift.errors import DataError, some

LABEL_TASKS = ("classification", "regression", "multi_label", "contrastive")
"""Tasks whose targets a label, a text or a number, can say."""
SEPARATOR = "\x1f"
"""Separator of units in ASCII, which stands in no name: for labels that are lists already."""


@dataclass(frozen=True)
class Targets:
    """The targets of examples.

    Args:
        task: their task.
        values: class number, number, or zeros and ones for all classes, of each example.
        classes: names of the classes; None for numbers.
        details: what the task must know of them, see `Examples`.
        problems: positions of labels that are not valid, each with the reason.
    """

    task: str
    values: list[Any]
    classes: tuple[str, ...] | None
    details: Mapping[str, Any] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def of(self, examples: Examples) -> Examples:
        """Return the examples with this task and what belongs to it."""
        return Examples(
            examples.dataset, self.task, self.classes, examples.collate, examples.reader,
            self.details,
        )  # fmt: skip


class Labelling(NamedTuple):
    """How the labels of examples are read; see `targets_of`."""

    task: str
    classes: Sequence[str] | None
    separator: str
    standardise: bool


def targets_of(
    labels: Sequence[str],
    task: str = "classification",
    classes: Sequence[str] | None = None,
    separator: str = ";",
    standardise: bool = True,
) -> Targets:
    """Return the targets that labels say.

    Args:
        labels: one text for each example.
        task: "classification", "regression", "multi_label" or "contrastive".
        classes: names of the classes in the order of their numbers; None finds them.
        separator: text between the classes of one example, for "multi_label".
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1.

    Raises:
        DataError: if there is no such task, or the labels do not make classes.

    Example:
        >>> targets_of(["red; round", "", "round"], "multi_label").values
        [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
        >>> targets_of(["1", "2.5", "much"], "regression").problems
        [(2, "'much' is not a number, which a regression needs")]
    """
    if task not in LABEL_TASKS:
        raise DataError(f"the task is {task!r}, expected one of {LABEL_TASKS}")
    if task in ("classification", "contrastive"):
        known = classes_of(labels, classes)
        numbers, unknown = numbers_of(labels, known)
        return Targets(task, numbers, known, problems=unknown)
    if task == "regression":
        if classes is not None:
            raise DataError("numbers have no classes: leave classes out, or choose another task")
        return _numbers(labels, standardise)
    return _several(labels, classes, separator)


def _numbers(labels: Sequence[str], standardise: bool) -> Targets:
    values, problems = [], []
    for place, label in enumerate(labels):
        value = _number(label)
        values.append(value)
        if not math.isfinite(value):
            said = f"{label.strip()!r:.60}" if label.strip() else "an empty label"
            problems.append((place, f"{said} is not a number, which a regression needs"))
    details = {}
    if standardise and not problems:
        std = statistics.pstdev(values)
        details["scale"] = {"mean": statistics.fmean(values), "std": std if std > 0 else 1.0}
    return Targets("regression", values, None, details, problems)


def _number(text: str) -> float:
    try:
        return float(text) if "_" not in text else math.nan  # Python's own notation
    except ValueError:
        return math.nan


def _several(labels: Sequence[str], classes: Sequence[str] | None, separator: str) -> Targets:
    if not separator or (separator.isspace() and separator != SEPARATOR):
        raise DataError(f"separator is {separator!r}, expected a text that stands between classes")
    parts = [[part.strip() for part in label.split(separator) if part.strip()] for label in labels]
    known = classes_of([name for names in parts for name in names], classes)
    place_of = {name: place for place, name in enumerate(known)}
    values, problems = [], []
    for place, names in enumerate(parts):
        row = [0.0] * len(known)
        for name in names:
            if name in place_of:
                row[place_of[name]] = 1.0
            else:
                problems.append((place, f"{name!r:.60} is none of the classes {some(known)}"))
        values.append(tuple(row))
    return Targets("multi_label", values, known, problems=problems)
