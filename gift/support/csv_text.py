"""Rows as the text of a CSV file."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], header: bool = True) -> str:
    """Return rows as CSV.

    Args:
        columns: names of the columns.
        rows: values by column; missing ones are left empty, others are left out.
        header: whether the first line has the names.
    """
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
