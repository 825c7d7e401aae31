"""Examples in tables: CSV and TSV files."""

import csv
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gift.data.examples import Examples, Reader
from gift.data.reading import read_examples
from gift.data.targets import Labelling, Targets, targets_of
from gift.errors import DataError, refuse, some

Column = str | int
_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Rows:
    """Values of selected columns of a table.

    Args:
        lines: line in the file on which each row ends, from 1.
        values: values of each row, one for each selected column.
    """

    lines: list[int]
    values: list[tuple[str, ...]]


def read_table(
    path: str | Path,
    columns: Sequence[Column],
    delimiter: str | None = None,
    optional: Sequence[Column] = (),
) -> Rows:
    """Read columns of a table by name, or by number if it has no header.

    Args:
        path: path of the UTF-8 file; empty lines are skipped.
        columns: names; or numbers, from 0, if the first row is not a header.
        delimiter: delimiter of columns; None is a tab for ``.tsv``, ``.tab`` and ``.txt`` files,
            else a comma. Quotes are interpreted unless the delimiter is a tab.
        optional: columns in which cells may be empty.

    Raises:
        DataError: naming all columns that are missing and all rows that are incomplete.
    """
    path = Path(path)
    lines, rows = _cells(path, delimiter)
    named = all(isinstance(column, str) for column in columns)
    if not named and not all(type(column) is int for column in columns):
        raise DataError(f"columns are {list(columns)}: give names for all of them, or numbers")
    width = len(rows[0])
    places = [_place(column, rows[0]) for column in columns]
    if problems := [place for place in places if isinstance(place, str)]:
        refuse(DataError, str(path), problems)
    problems = [
        f"line {line}: {len(row)} columns, expected {width} as in the first line"
        for line, row in zip(lines, rows, strict=True)
        if len(row) != width
    ]
    values = []
    for line, row in list(zip(lines, rows, strict=True))[named:]:
        if len(row) == width:
            values.append(tuple(row[place] for place in places if isinstance(place, int)))
            cells = zip(columns, values[-1], strict=True)
            empty = [c for c, cell in cells if not cell.strip() and c not in optional]
            problems += [f"line {line}: nothing in column {column!r}" for column in empty]
    refuse(DataError, str(path), problems)
    if not values:
        refuse(DataError, str(path), ["there is a header, but no rows below it"])
    return Rows(lines[named:], values)


def header_of(path: str | Path, delimiter: str | None = None) -> list[str]:
    """Return the cells of the first row of a table; see `read_table`."""
    return [cell.strip() for cell in _cells(Path(path), delimiter)[1][0]]


def _cells(path: Path, delimiter: str | None) -> tuple[list[int], list[list[str]]]:
    """Return the rows that are not empty, and the lines on which they end."""
    if delimiter is None:
        delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab", ".txt") else ","
    lines, rows, start = [], [], 1
    try:
        with _any_length(), path.open(encoding="utf-8-sig", newline="") as file:
            if delimiter == "\t":
                reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            else:
                # Without strict, an unclosed quote would swallow the rest of the file.
                reader = csv.reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                start = reader.line_num + 1
                if any(cell.strip() for cell in row):
                    lines.append(reader.line_num)
                    rows.append(row)
    except FileNotFoundError:
        refuse(DataError, str(path), ["there is no such file"])
    except UnicodeDecodeError as error:
        refuse(DataError, str(path), [f"this is not text in UTF-8, save it as such: {error}"])
    except (OSError, csv.Error, TypeError) as error:
        reason = f"{error}"
        if "unexpected end of data" in reason or "expected after" in reason:
            reason = (
                f"a quote is not closed, or stands within a field ({error}): write the field in "
                'quotes, and each quote in it twice ("")'
            )
        refuse(DataError, str(path), [f"line {start}: this cannot be read as a table: {reason}"])
    if not rows:
        refuse(DataError, str(path), ["the table is empty"])
    return lines, rows


@contextmanager
def _any_length() -> Iterator[None]:
    """Lift the field size limit of the csv module, since texts may be longer."""
    with _LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _place(column: Column, first: list[str]) -> int | str:
    """Return the index of a column, or what is wrong with it."""
    if isinstance(column, str):
        names = [name.strip() for name in first]
        if names.count(column) > 1:
            places = [str(place) for place, name in enumerate(names) if name == column]
            return f"line 1: {len(places)} columns are called {column!r}, {some(places)} from 0"
        if column in names:
            return names.index(column)
        shown = [name if len(name) < 30 else f"{name[:27]}..." for name in names]
        return (
            f"there is no column {column!r}, only {shown}; if the first line is not a header, give "
            "the numbers of columns, from 0"
        )
    if 0 <= column < len(first):
        return column
    return f"there is no column {column}: there are {len(first)}, numbered from 0"


def read_labelled(
    path: str | Path,
    columns: Sequence[Column],
    label: Column,
    delimiter: str | None,
    labelling: Labelling,
    optional: Sequence[Column] = (),
) -> tuple[Rows, Targets, list[str]]:
    """Return columns and the label after them, its targets, and the problems with it, by line."""
    none = (label,) if labelling.task == "multi_label" else ()  # an empty cell: none of the classes
    rows = read_table(path, (*columns, label), delimiter, (*optional, *none))
    labels = [values[-1].strip() for values in rows.values]
    try:
        found = targets_of(labels, *labelling)
    except DataError as error:
        raise DataError(f"{path}\n  {error}") from None
    return rows, found, [f"line {rows.lines[place]}: {reason}" for place, reason in found.problems]


def beside_table(csv: str | Path, line: int, name: str, what: str, problems: list[str]) -> str:
    """Return the path of a file that a table names, and add a problem if there is none."""
    file = Path(csv).parent / name.strip()
    if not file.is_file() or not file.stat().st_size:
        problems.append(f"line {line}: there is no {what} {file}")
    return str(file)


def picture_table(
    csv: str | Path,
    reader: Reader,
    path: Column = "path",
    label: Column = "label",
    classes: Sequence[str] | None = None,
    augment: bool = False,
    delimiter: str | None = None,
    task: str = "classification",
    separator: str = ";",
    standardise: bool = True,
) -> Examples:
    """Load images that a table of paths and labels lists.

    Args:
        csv: CSV or TSV table; its paths are relative to its folder.
        reader: converts images to tensors: `PictureReader`, or the reader of a network's weights.
        path: column of the paths: its name in the header, or its number from 0 if there is no
            header.
        label: column of the labels, which can be any text.
        classes: labels in the order of their numbers, `train.classes` for validation; None sorts
            them alphabetically, or numerically if they are numbers.
        augment: crop and flip images at random, for training.
        delimiter: delimiter of columns; None chooses it by the file name.
        task: "classification"; "regression" for labels that are numbers; "multi_label" for
            labels that name any number of classes; or "contrastive" for vectors in which those of
            a class are close.
        separator: text between the classes of one label, for "multi_label".
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1. Metrics and predictions are in the units of the table.

    Raises:
        DataError: naming all rows that are incomplete, without a known class, or without a file.
    """
    labelling = Labelling(task, classes, separator, standardise)
    table = read_labelled(csv, (path,), label, delimiter, labelling)
    return _read_files(csv, table, "image", reader, augment)


def audio_table(
    csv: str | Path,
    reader: Reader,
    path: Column = "path",
    label: Column = "label",
    classes: Sequence[str] | None = None,
    augment: bool = False,
    delimiter: str | None = None,
    task: str = "classification",
    separator: str = ";",
    standardise: bool = True,
) -> Examples:
    """Load sounds that a table of paths and labels lists.

    Args:
        csv: CSV or TSV table; its paths are relative to its folder.
        reader: converts sounds: `AudioReader`, `ExtractorReader`, or the reader of a network.
        path: column of the paths: its name in the header, or its number from 0 if there is no
            header.
        label: column of the labels, which can be any text.
        classes: labels in the order of their numbers, `train.classes` for validation; None sorts
            them alphabetically, or numerically if they are numbers.
        augment: take a random part of long sounds, for training.
        delimiter: delimiter of columns; None chooses it by the file name.
        task: "classification"; "regression" for labels that are numbers; "multi_label" for
            labels that name any number of classes; or "contrastive" for vectors in which those of
            a class are close.
        separator: text between the classes of one label, for "multi_label".
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1. Metrics and predictions are in the units of the table.

    Raises:
        DataError: naming all rows that are incomplete, without a valid label, or without a file.
    """
    labelling = Labelling(task, classes, separator, standardise)
    table = read_labelled(csv, (path,), label, delimiter, labelling)
    return _read_files(csv, table, "sound", reader, augment)


def _read_files(
    csv: str | Path,
    table: tuple[Rows, Targets, list[str]],
    what: str,
    reader: Reader,
    augment: bool,
) -> Examples:
    """Load the files that a table of paths and labels lists."""
    rows, targets, problems = table
    files = [
        beside_table(csv, line, name, what, problems)
        for line, (name, _) in zip(rows.lines, rows.values, strict=True)
    ]
    refuse(DataError, str(csv), problems)
    return targets.of(read_examples(list(zip(files, targets.values, strict=True)), reader, augment))


def text_table(
    path: str | Path,
    reader: Reader,
    text: Column = "text",
    label: Column = "label",
    pair: Column | None = None,
    classes: Sequence[str] | None = None,
    delimiter: str | None = None,
    task: str = "classification",
    separator: str = ";",
    standardise: bool = True,
) -> Examples:
    r"""Load texts and their labels from a table.

    Args:
        path: path of the CSV or TSV table.
        reader: converts texts to token ids: `TextReader`.
        text: column of the texts: its name in the header, or its number from 0 if there is no
            header.
        label: column of the labels, which can be any text.
        pair: column of second texts, for tasks on pairs of texts; None for single texts.
        classes: labels in the order of their numbers, `train.classes` for validation; or names for
            labels that are numbers. None sorts labels alphabetically, or numerically if they are
            numbers.
        delimiter: delimiter of columns; None chooses it by the file name.
        task: "classification"; "regression" for labels that are numbers; "multi_label" for
            labels that name any number of classes; or "contrastive" for vectors in which those of
            a class are close.
        separator: text between the classes of one label, for "multi_label".
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1. Metrics and predictions are in the units of the table.

    Raises:
        DataError: naming all rows that are incomplete or without a known class.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gift.data import text_table
        >>> path = Path(tempfile.mkdtemp(), "reviews.tsv")
        >>> _ = path.write_text("a joy\t1\nso \"deep\"\t0\n")
        >>> examples = text_table(path, str.split, text=0, label=1, classes=["bad", "good"])
        >>> examples.dataset[1], examples.classes
        ((['so', '"deep"'], 0), ('bad', 'good'))
    """
    columns = (text,) if pair is None else (text, pair)
    labelling = Labelling(task, classes, separator, standardise)
    rows, targets, problems = read_labelled(path, columns, label, delimiter, labelling)
    refuse(DataError, str(path), problems)
    texts = [values[0] if pair is None else values[:2] for values in rows.values]
    return targets.of(read_examples(list(zip(texts, targets.values, strict=True)), reader))
