"""Tables of numbers and categories."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gift.data.examples import Examples
from gift.data.readers.rows import RowReader, category_of, number_of
from gift.data.reading import read_examples
from gift.data.tables import header_of, read_labelled
from gift.data.targets import Labelling
from gift.errors import DataError, GiftWarning, refuse, some
from gift.support.optional import require

MOST_CATEGORIES = 1000
"""Largest number of categories of a column; more of them are names rather than categories."""
_MOSTLY = 0.9  # share of numbers from which on a column is taken for numeric


def tabular(
    csv: str | Path,
    label: str = "label",
    reader: RowReader | None = None,
    columns: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    ignore: Sequence[str] = (),
    encode: str = "onehot",
    classes: Sequence[str] | None = None,
    delimiter: str | None = None,
    task: str = "classification",
    separator: str = ";",
    standardise: bool = True,
) -> Examples:
    """Load a table of numbers and categories, for a network of your own.

    Without a reader, one is made from the table by scikit-learn: numbers are standardised
    (`StandardScaler`), missing ones become the median (`SimpleImputer`) and get a further input
    that says so, categories become ones and zeros (`OneHotEncoder`). A column is numeric if its
    cells are numbers. Empty cells, and ``NA``, ``nan``, ``?``, ``null`` and ``none``, are missing.

    Args:
        csv: CSV or TSV table with a header.
        label: column of the labels.
        reader: converts rows, `train.reader` for validation; None makes one from this table.
        columns: columns that the network sees; None takes all but the label.
        categorical: columns of categories whose names are numbers, such as post codes.
        ignore: columns that are left out, such as row numbers.
        encode: "onehot" for one tensor of all inputs, "index" for embeddings; see `RowReader`.
        classes: labels in the order of their numbers, `train.classes` for validation; None sorts
            them alphabetically, or numerically if they are numbers.
        delimiter: delimiter of columns; None chooses it by the file name.
        task: "classification"; "regression" for labels that are numbers; "multi_label" for
            labels that name any number of classes; or "contrastive" for vectors in which those of
            a class are close.
        separator: text between the classes of one label, for "multi_label".
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1. Metrics and predictions are in the units of the table.

    Raises:
        DataError: naming all columns that are missing or cannot be used, and all cells that are not
            valid, with their lines.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gift.data import tabular
        >>> path = Path(tempfile.mkdtemp(), "flowers.csv")
        >>> _ = path.write_text("size,colour,label\\n1,red,a\\n3,blue,b\\n,red,a\\n")
        >>> examples = tabular(path)
        >>> examples.reader.features
        ('size', 'size is missing', 'colour=blue', 'colour=red')
        >>> examples.dataset[0]
        (tensor([-1.2247,  0.0000,  0.0000,  1.0000]), 0)
    """
    if reader is not None:
        names: tuple[str, ...] = reader.columns
    else:
        header = [name for name in header_of(csv, delimiter) if name]
        wanted = header if columns is None else list(columns)
        names = tuple(name for name in wanted if name != label and name not in ignore)
        unknown = [name for name in (*categorical, *ignore) if name not in header]
        refuse(DataError, str(csv), [f"there is no column {n!r}, only {header}" for n in unknown])
        if not names:
            refuse(DataError, str(csv), ["there is no column besides the label"])
    labelling = Labelling(task, classes, separator, standardise)
    table, targets, problems = read_labelled(
        csv, names, label, delimiter, labelling, optional=names
    )
    rows = [dict(zip(names, cells[:-1], strict=True)) for cells in table.values]
    if reader is None:
        found, wrong = _reader(names, rows, table.lines, categorical, encode)
        problems += wrong
        refuse(DataError, str(csv), problems)
        assert found is not None
        reader = found
    else:
        problems += [
            f"line {line}: {problem}"
            for line, row in zip(table.lines, rows, strict=True)
            for problem in reader.problems(row)
        ]
        refuse(DataError, str(csv), problems)
        _warn_of_unknown(csv, reader, rows, table.lines)
    return targets.of(read_examples(list(zip(rows, targets.values, strict=True)), reader))


def _reader(
    names: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    lines: Sequence[int],
    categorical: Sequence[str],
    encode: str,
) -> tuple[RowReader | None, list[str]]:
    """Return a reader fitted to the rows, or what is wrong with them."""
    numeric: dict[str, dict[str, Any]] = {}
    categories: dict[str, list[str]] = {}
    problems: list[str] = []
    for name in names:
        cells = [row[name] for row in rows]
        if name not in categorical and _is_numeric(cells):
            problems += _no_numbers(name, cells, lines)
            numeric[name] = _fitted_numbers(cells)
        else:
            problems += _no_categories(name, cells)
            categories[name] = _fitted_categories(cells)
    if problems:
        return None, problems
    try:
        return RowReader(numeric, categories, encode), []
    except ValueError as error:
        return None, [str(error)]


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether most cells that are not empty are numbers."""
    numbers = [number_of(cell) for cell in cells]
    given = [value for value in numbers if value is None or not math.isnan(value)]
    return sum(value is not None for value in given) > _MOSTLY * len(given)


def _no_numbers(name: str, cells: Sequence[str], lines: Sequence[int]) -> Iterator[str]:
    for line, cell in zip(lines, cells, strict=True):
        if number_of(cell) is None:
            yield (
                f"line {line}: {cell.strip()!r:.60} in column {name!r}, whose other cells are "
                f"numbers: correct it, or give categorical=[{name!r}]"
            )


def _no_categories(name: str, cells: Sequence[str]) -> Iterator[str]:
    counts = Counter(map(category_of, cells))
    if set(counts) == {""}:
        yield f"column {name!r} is empty: give ignore=[{name!r}]"
    elif len(counts) > MOST_CATEGORIES or (len(counts) > 20 and len(counts) > 0.9 * len(cells)):
        yield (
            f"column {name!r} has {len(counts):,} different texts in {len(cells):,} rows, such as "
            f"{some([repr(text)[:30] for text in counts], 2)}: these are not categories, give "
            f"ignore=[{name!r}]"
        )


def _fitted_numbers(cells: Sequence[str]) -> dict[str, Any]:
    impute = require("sklearn.impute", "tables")
    preprocessing = require("sklearn.preprocessing", "tables")
    values = [[math.nan if (value := number_of(cell)) is None else value] for cell in cells]
    imputer = impute.SimpleImputer(strategy="median")
    scaler = preprocessing.StandardScaler().fit(imputer.fit_transform(values))
    return {
        "fill": float(imputer.statistics_[0]),
        "mean": float(scaler.mean_[0]),
        "std": float(scaler.scale_[0]),
        "indicator": any(math.isnan(value) for [value] in values),
    }


def _fitted_categories(cells: Sequence[str]) -> list[str]:
    preprocessing = require("sklearn.preprocessing", "tables")
    encoder = preprocessing.OneHotEncoder().fit([[category_of(cell)] for cell in cells])
    return [str(name) for name in encoder.categories_[0]]


def _warn_of_unknown(
    csv: str | Path, reader: RowReader, rows: Sequence[Mapping[str, str]], lines: Sequence[int]
) -> None:
    unknown = [
        f"line {line}, {name}={category_of(row[name])!r:.40}"
        for line, row in zip(lines, rows, strict=True)
        for name in reader.unknown(row)
    ]
    if unknown:
        warnings.warn(
            f"{csv}: {len(unknown)} categories are unknown to the training examples, and taken as "
            f"none of theirs: {some(unknown)}",
            GiftWarning,
            stacklevel=3,
        )
