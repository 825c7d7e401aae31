"""A comparison of methods: mean and spread of each metric and cost, as a table and a report."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gift.many.batch import Ended
from gift.many.pages import write_images
from gift.support.atomic_files import write_bytes, write_text
from gift.support.csv_text import csv_text
from gift.support.optional import require
from gift.training.report.page import rendered
from gift.training.report.plots import Theme
from gift.training.report.tables import Table, plain, words

COSTS = ("trained", "megabytes", "step_seconds", "peak_memory", "forgetting")
_HEADERS = {
    "trained": "parameters", "megabytes": "MB", "step_seconds": "ms a step",
    "peak_memory": "peak MB", "forgetting": "forgetting",
}  # fmt: skip
_FACTORS = {"step_seconds": 1e3, "peak_memory": 1e-6}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some values.

    Args:
        mean: the mean; nan if there are none.
        deviation: the standard deviation, with n - 1; nan for less than two values.
        values: the values.
    """

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread":
        """Return the spread of those values that are there."""
        known = tuple(float(value) for value in values if value is not None)
        mean = statistics.fmean(known) if known else math.nan
        return cls(mean, statistics.stdev(known) if len(known) > 1 else math.nan, known)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2g}"
        return f"{self.mean:.4g}{spread}"


@dataclass(frozen=True)
class Compared:
    """The runs of one method.

    Args:
        name: the method, with its settings.
        folders: folders of the runs, one for each seed.
        values: spread of each metric after training, and of the costs.
        failures: reasons of runs that failed.
    """

    name: str
    folders: tuple[Path, ...]
    values: dict[str, Spread]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods, best first; prints as a table.

    Args:
        metric: the metric by which they are ordered.
        rows: the methods.
        folder: folder with ``comparison.csv``, ``runs.csv``, ``comparison.txt`` and
            ``report.html``.
    """

    metric: str
    rows: tuple[Compared, ...]
    folder: Path
    metrics: tuple[str, ...] = field(repr=False, default=())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of texts."""
        costs = [c for c in COSTS if any(row.values[c].values for row in self.rows)]
        header = ["method", *self.metrics, *(_HEADERS[cost] for cost in costs), "runs"]
        rows = []
        for row in self.rows:
            done = f"{len(row.folders) - len(row.failures)} of {len(row.folders)}"
            cells = [str(row.values[name]) for name in self.metrics]
            rows.append(
                [row.name, *cells, *(_cost(name, row.values[name]) for name in costs), done]
            )
        return header, rows

    def __str__(self) -> str:
        header, rows = self.table()
        text = tabulate(
            rows, headers=header, disable_numparse=True,
            colalign=("left", *["right"] * (len(header) - 1)),
        )  # fmt: skip
        failures = [f"{row.name}: {reason}" for row in self.rows for reason in row.failures]
        return "\n".join([text, *(f"failed: {failure}" for failure in dict.fromkeys(failures))])


def _cost(name: str, spread: Spread) -> str:
    if not spread.values:
        return "-"
    if name == "trained":
        return f"{spread.mean:,.0f}"
    factor = _FACTORS.get(name, 1.0)
    if name == "megabytes":
        return f"{spread.mean:.4g}"
    return str(Spread.of(value * factor for value in spread.values))


def write_comparison(made: Comparison, results: Mapping[tuple[str, int], Ended]) -> None:
    """Write a comparison into its folder: tables as text and CSV, and a report.

    Args:
        made: the comparison.
        results: how each run ended, by method and seed.
    """
    folder, header_rows = made.folder, made.table()
    write_text(folder / "comparison.txt", f"{made}\n")
    numbers = [*made.metrics, *COSTS]
    rows = []
    for row in made.rows:
        cells: dict[str, Any] = {"method": row.name, "runs": len(row.folders) - len(row.failures)}
        for name in numbers:
            cells |= {
                f"{name}_mean": row.values[name].mean,
                f"{name}_std": row.values[name].deviation,
            }
        rows.append(cells)
    write_text(folder / "comparison.csv", csv_text(list(rows[0]), rows))
    runs = [
        {"method": name, "seed": seed, **{m: how.result["after"].get(m) for m in made.metrics},
         **{cost: how.result.get(cost) for cost in COSTS}}
        for (name, seed), how in results.items() if how.result is not None
    ]  # fmt: skip
    write_text(folder / "runs.csv", csv_text(list(runs[0]), runs))
    alt = f"Mean {words(made.metric)} of each method, with a dot for each run; see the table."
    title = f"{words(made.metric)} and parameters"
    images = write_images(folder, {"comparison": (title, alt, _picture)}, made)
    header, texts = header_rows
    table = Table("Methods: mean ± standard deviation over seeds", header, texts)
    failed = [[row.name, plain(reason)] for row in made.rows for reason in row.failures]
    tables = [table, *([Table("Failed", ["method", "reason"], failed, words=[1])] * bool(failed))]
    facts = [("Methods", str(len(made.rows))), ("Runs", str(len(runs))), ("Folder", str(folder))]
    page = rendered("Methods compared", facts, images, tables)
    write_bytes(folder / "report.html", page.encode(errors="replace"))


def _picture(made: Comparison, theme: Theme) -> Any:
    """Draw the metric against the trained parameters: runs as dots, means as bars with spread."""
    rows = [row for row in made.rows if made.metrics and row.values[made.metric].values]
    if not rows:
        return None
    figure = require("matplotlib.figure", "train").Figure(
        (7.2, 1.2 + 0.5 * len(rows)), layout="constrained"
    )
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(rows)):
        spread = row.values[made.metric]
        axes.plot(spread.values, [place] * len(spread.values), "o", color=theme.colours[0],
                  alpha=0.5, markersize=5)  # fmt: skip
        width = 0.0 if math.isnan(spread.deviation) else spread.deviation
        axes.errorbar([spread.mean], [place], xerr=[width], fmt="|", color=theme.colours[1],
                      markersize=14, capsize=4)  # fmt: skip
    names = [f"{row.name} ({_cost('trained', row.values['trained'])})" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.set(xlabel=words(made.metric))
    axes.margins(y=0.15)
    return figure
