"""Readers of rows of a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.errors import DataError, some

MISSING = ("", "?", "na", "n/a", "nan", "none", "null", "<na>")
"""Cells that say that a value is missing, in lower case."""
ENCODINGS = ("onehot", "index")


@dataclass(frozen=True)
class RowReader:
    """Converts rows of a table to tensors.

    `gift.data.tabular` makes one from the training examples. Its settings are plain numbers and
    texts, so a file that holds them runs no code.

    Args:
        numeric: columns of numbers, each with "fill" (for missing values), "mean", "std", and
            "indicator", whether a further input says that the value is missing.
        categorical: columns of categories, each with its categories in the order of their numbers.
            A missing value is the category "".
        encode: "onehot" gives a tensor of all inputs, in which unknown categories are zeros;
            "index" a dictionary of "numeric", the numbers, and "categorical", for each column the
            number of its category from 1, with 0 for unknown ones, for embeddings.

    Raises:
        ValueError: naming all settings that are not valid.

    Example:
        >>> from gift.data import RowReader
        >>> age = {"fill": 40.0, "mean": 40.0, "std": 10.0, "indicator": False}
        >>> reader = RowReader({"age": age}, {"colour": ["blue", "red"]})
        >>> reader({"age": "60", "colour": "red"}), reader({"age": "", "colour": "green"})
        (tensor([2., 0., 1.]), tensor([0., 0., 0.]))
    """

    kind: ClassVar[str] = "row"
    stands_alone: ClassVar[bool] = True

    numeric: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    categorical: Mapping[str, Sequence[str]] = field(default_factory=dict)
    encode: str = "onehot"

    def __post_init__(self) -> None:
        for name in ("numeric", "categorical"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ValueError(f"{name} is {value!r:.60}, expected columns by their names")
        problems = [
            f"numeric column {name!r} is {about!r:.80}, expected numbers fill, mean and std > 0, "
            "and indicator"
            for name, about in self.numeric.items()
            if not _is_numeric(about)
        ]
        problems += [
            f"categories of {name!r} are {known!r:.80}, expected different texts"
            for name, known in self.categorical.items()
            if not _are_texts(known)
        ]
        if twice := sorted(set(self.numeric) & set(self.categorical)):
            problems.append(f"{some(twice)}: numeric and categorical at once")
        if not self.columns:
            problems.append("there are no columns")
        if self.encode not in ENCODINGS:
            problems.append(f"encode is {self.encode!r}, expected one of {ENCODINGS}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that are read."""
        return (*self.numeric, *self.categorical)

    @property
    def features(self) -> tuple[str, ...]:
        """The name of each input of the network: ``age``, ``age is missing``, ``colour=red``."""
        missing = (f"{name} is missing" for name, about in self.numeric.items()
                   if about["indicator"])  # fmt: skip
        if self.encode == "index":
            return (*self.numeric, *missing, *self.categorical)
        each = (f"{name}={value}" for name, known in self.categorical.items() for value in known)
        return (*self.numeric, *missing, *each)

    def __call__(self, raw: Any) -> Any:
        """Convert a row, the cells by the names of their columns.

        Raises:
            DataError: naming all columns that are missing, and all cells that are not numbers.
        """
        if not isinstance(raw, Mapping):
            raise DataError(f"expected a row, cells by the names of columns, got {raw!r:.60}")
        values, problems = self._values(raw)
        if problems:
            raise DataError(f"a row cannot be read: {'; '.join(problems)}")
        return values

    def problems(self, raw: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with a row."""
        return self._values(raw)[1]

    def _values(self, raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
        problems = [f"there is no column {name!r}" for name in self.columns if name not in raw]
        numbers: list[float] = []
        missing: list[float] = []
        categories: list[float] = []
        for name, about in self.numeric.items():
            value = number_of(raw.get(name, ""))
            if value is None:
                problems.append(f"column {name!r} is {raw[name]!r:.60}, expected a number")
            given = about["fill"] if value is None or math.isnan(value) else value
            numbers.append((given - about["mean"]) / about["std"])
            if about["indicator"]:
                missing.append(1.0 if value is None or math.isnan(value) else 0.0)
        for name, known in self.categorical.items():
            cell = category_of(raw.get(name, ""))
            if self.encode == "index":
                categories.append(float(known.index(cell) + 1 if cell in known else 0))
            else:
                categories += [1.0 if cell == one else 0.0 for one in known]
        if self.encode == "onehot":
            return torch.tensor([*numbers, *missing, *categories]), problems
        return {
            "numeric": torch.tensor([*numbers, *missing]),
            "categorical": torch.tensor(categories, dtype=torch.int64),
        }, problems

    def unknown(self, raw: Mapping[str, Any]) -> list[str]:
        """Return the columns of a row whose category the training examples did not have."""
        return [
            name
            for name, known in self.categorical.items()
            if category_of(raw.get(name, "")) not in known
        ]

    def augmented(self, raw: Any) -> Any:
        """Convert in the same way: rows are not augmented."""
        return self(raw)

    def collate(self, items: Sequence[Any]) -> Any:
        """Stack the tensors."""
        if self.encode == "onehot":
            return torch.stack(list(items))
        parts: dict[str, Tensor] = {}
        for name in ("numeric", "categorical"):
            parts[name] = torch.stack([item[name] for item in items])
        return parts

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`."""
        return {
            "kind": self.kind,
            "numeric": {name: dict(about) for name, about in self.numeric.items()},
            "categorical": {name: list(known) for name, known in self.categorical.items()},
            "encode": self.encode,
        }


def number_of(cell: Any) -> float | None:
    """Return the number in a cell, nan if it is missing, None if it is something else.

    Example:
        >>> number_of("1.5"), number_of("n/a"), number_of("red")
        (1.5, nan, None)
    """
    text = "" if cell is None else str(cell).strip()
    if text.lower() in MISSING:
        return math.nan
    try:
        value = float(text) if "_" not in text else None  # Python's own notation
    except ValueError:
        return None
    return None if value is None or math.isinf(value) else value


def category_of(cell: Any) -> str:
    """Return the category in a cell; "" if it is missing."""
    text = "" if cell is None else str(cell).strip()
    return "" if text.lower() in MISSING else text


def _is_numeric(about: Any) -> bool:
    if not isinstance(about, Mapping) or set(about) != {"fill", "mean", "std", "indicator"}:
        return False
    numbers = [about[key] for key in ("fill", "mean", "std")]
    fits = all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    return fits and about["std"] > 0 and isinstance(about["indicator"], bool)


def _are_texts(known: Any) -> bool:
    return (
        isinstance(known, list | tuple)
        and all(isinstance(value, str) for value in known)
        and len(set(known)) == len(known)
    )
