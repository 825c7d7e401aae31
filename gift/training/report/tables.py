"""The tables of a report as texts, independent of how they are rendered."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gift.training.result import Result

MOST_CONFUSIONS = 20  # maximum number of rows in the table of confusions


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: title of the table.
        header: header of each column.
        rows: rows of the same length as the header; the first text names the row.
        note: note for the reader; may be empty.
        words: indices of the columns that are not numbers, besides the first.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: Sequence[int] = ()


def number(value: float | None, sign: str = "") -> str:
    """Format a value with four digits; None becomes a dash."""
    if value is None:
        return "-"
    if math.isfinite(value) and float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):{sign},}"
    if math.isfinite(value) and 1e-3 <= abs(value) < 1e4:
        return f"{value:{sign}.{min(4, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:{sign}.4g}"


def duration(seconds: float) -> str:
    """Format a duration, such as 2 h 5 min."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plain(text: str) -> str:
    """Return a text on one line, without control characters."""
    shown = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)
    return " ".join(shown.split())


def words(name: str) -> str:
    """Make the name of a column or metric readable: "valid_f1" becomes "valid f1"."""
    return plain(name.replace("_", " "))


def class_names(result: Result) -> list[str]:
    """Return a name for each row of the confusion matrix, or its number if it has none."""
    known = result.classes or ()
    count = len(result.confusion or ())
    return [plain(known[i]) or f"{i}" if i < len(known) else f"{i}" for i in range(count)]


def facts(result: Result) -> list[tuple[str, str]]:
    """Summarize the run as names and texts."""
    share = f" ({100 * result.trained / result.total:.3g} %)" if result.total else ""
    seconds = [row["seconds"] for row in result.history if "seconds" in row]
    classes = f" in {len(result.classes):,} classes" if result.classes else ""
    best = "" if result.best_epoch is None else f"; the best was epoch {result.best_epoch}"
    rows = [
        ("Network", result.network),
        ("Task", result.task + classes),
        ("Strategy", result.strategy),
        ("Schedule", result.schedule),
        ("Trained parameters", f"{result.trained:,} of {result.total:,}{share}"),
        ("Epochs", f"{len(result.history):,}{best}"),
        ("Steps", f"{len(result.steps):,}"),
        ("Time", duration(sum(seconds)) if seconds else ""),
        ("Ended", "as planned" if result.stopped == "done" else result.stopped),
        ("Folder", str(result.folder or "")),
    ]
    return [(name, plain(text)) for name, text in rows if text]


def compared(title: str, before: Mapping[str, float], after: Mapping[str, float]) -> Table | None:
    """Compare metrics before and after; None if there are none."""
    if not (names := _union((before, after))):
        return None
    rows = []
    for name in names:
        old, new = before.get(name), after.get(name)
        change = None if old is None or new is None else new - old
        rows.append([words(name), number(old), number(new), number(change, "+")])
    return Table(title, ["", "before", "after", "change"], rows)


def comparisons(result: Result) -> list[Table]:
    """Return the comparisons before and after, on the new task and on the old one."""
    new = compared("New task, on the validation examples", result.before, result.after)
    old = compared("Old task: what is lost here is forgotten", result.old_before, result.old_after)
    return [table for table in (new, old) if table]


def epochs(result: Result) -> Table | None:
    """Return a row for each epoch; the best one is marked."""
    if not result.history:
        return None
    columns = _union(result.history)
    rows = []
    for row in result.history:
        texts = [number(row.get(column)) for column in columns]
        best = result.best_epoch is not None and row.get("epoch") == result.best_epoch
        rows.append([*texts, "best" if best else ""])
    return Table("Each epoch", [*map(words, columns), ""], rows)


def unfrozen(result: Result) -> Table | None:
    """Return the blocks that the schedule unfroze in each epoch."""
    rows = [
        [number(epoch), number(len(blocks)), plain(", ".join(blocks))]
        for epoch, blocks in sorted(result.unfrozen.items())
        if blocks
    ]
    title = "What the schedule unfroze"
    return Table(title, ["epoch", "blocks", "names"], rows, words=[2]) if rows else None


def classes(result: Result) -> Table | None:
    """Return recall and precision of each class."""
    matrix = result.confusion
    if not matrix:
        return None
    said = [sum(row[place] for row in matrix) for place in range(len(matrix))]
    rows = []
    for place, name in enumerate(class_names(result)):
        there, right = sum(matrix[place]), matrix[place][place]
        recall = right / there if there else None
        precision = right / said[place] if said[place] else None
        rows.append([name, number(there), number(right), number(recall), number(precision)])
        if result.task == "segmentation":
            either = there + said[place] - right
            rows[-1].append(number(right / either if either else None))
    header = ["class", "examples", "found", "recall", "precision"]
    if result.task == "segmentation":
        header = ["class", "pixels", "found", "recall", "precision", "IoU"]
    return Table("Each class", header, rows)


def confusions(result: Result) -> Table | None:
    """Return the most frequent mistakes."""
    names, matrix = class_names(result), result.confusion or []
    mistakes = [
        (count, true, said)
        for true, row in enumerate(matrix)
        for said, count in enumerate(row)
        if count and true != said
    ]
    if not mistakes:
        return None
    mistakes.sort(key=lambda mistake: (-mistake[0], mistake[1:]))
    rows = [
        [names[true], names[said], number(count), number(count / sum(matrix[true]))]
        for count, true, said in mistakes[:MOST_CONFUSIONS]
    ]
    more = len(mistakes) - len(rows)
    header = ["true", "predicted", "times", "share of the class"]
    note = f"and {more:,} more pairs" if more else ""
    return Table("Most frequent mistakes", header, rows, note, words=[1])


def _union(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Return all keys in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def about(result: Result) -> list[Table]:
    """Return facts about the run by their sections: environment, examples, settings."""
    return [
        Table(title, ["", ""], [[plain(k), plain(v)] for k, v in section.items()], words=[1])
        for title, section in result.about.items()
        if section
    ]


def skipped(result: Result) -> Table | None:
    """Return the examples that were left out, and why."""
    shown = result.skipped[:MOST_CONFUSIONS]
    more = len(result.skipped) - len(shown)
    note = f"and {more:,} more, see damaged.txt" if more else ""
    rows = [[f"{number}", plain(text)] for number, text in enumerate(shown, 1)]
    return Table("Left out", ["", "reason"], rows, note, words=[1]) if rows else None
