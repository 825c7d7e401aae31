"""`compare`: one job with several methods and seeds, as a table with mean and spread."""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gift.errors import JobError, refuse
from gift.jobs.models import Job
from gift.jobs.reading import read_job
from gift.many.batch import Ended, run_all
from gift.many.costs import Costs
from gift.many.engines.base import Engine
from gift.many.engines.local import Here, Processes
from gift.many.networks import counted_network
from gift.many.pages import write_images
from gift.many.task import is_higher_better, watched
from gift.many.variants import parsed, split_list, varied
from gift.support.atomic_files import write_bytes, write_text
from gift.support.optional import require
from gift.training.metrics import metrics_of
from gift.training.report.page import rendered
from gift.training.report.plots import Theme
from gift.training.report.tables import Table, plain, words

_COSTS = ("trained", "megabytes", "step_seconds", "peak_memory", "forgetting")
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
        costs = [c for c in _COSTS if any(row.values[c].values for row in self.rows)]
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


def compare(
    job: Job | str | Path,
    methods: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    folder: str | Path = "comparison",
    budget: int | float | str | None = None,
    parallel: int = 1,
    network: Callable[[], Any] | str | None = None,
    engine: Engine | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run a job with several methods and seeds, and compare what comes of it.

    Each run is the folder of a job like any other. The same call later runs only what is missing.

    Args:
        job: the job, or its file. Its strategy gives the layers: with ``DoRALinear...``, all
            methods adapt linear layers.
        methods: names of methods, strategies or YAML files of strategies, with settings of the job
            behind them: ``["lora", "lora:rank=8:lr=1e-3", "ia3", "full", "head"]``. ``full`` trains
            everything, ``head`` a new head alone.
        seeds: number of seeds, from that of the job on, or the seeds.
        folder: folder of the comparison.
        budget: gives methods with a rank, or another size, the sizes that `gift.suggest` chooses.
        parallel: number of runs at a time.
        network: for a job that names no network, see `gift.search`.
        engine: where the runs run; None starts processes on this machine.
        tell: called with a line for each run that ends.

    Raises:
        JobError: naming everything that is wrong, before anything runs.
    """
    made = job if isinstance(job, Job) else read_job(job)
    made = made.anchored(Path.cwd())
    folder = Path(folder).expanduser().resolve()
    if made.network is None and network is None:
        raise JobError("the job names no network", ["network: name one, or give it"])
    first = made.training.seed or 0
    numbers = list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
    costs = Costs(counted_network(network)) if budget is not None else None
    jobs = _jobs(made, methods, numbers, folder, budget, costs)
    if engine is None:
        engine = Here(network) if callable(network) else Processes(parallel, network)

    def told(name: str, how: Ended) -> None:
        done = " (was done)" if how.was_done else ""
        tell(f"{name} failed: {how.reason}" if how.result is None else f"{name} is done{done}")

    flat = {f"{name}, seed {seed}": one for (name, seed), one in jobs.items()}
    ended = run_all(flat, engine, told, parallel)
    return _concluded(made, jobs, ended, folder)


def _jobs(
    job: Job, methods: Sequence[str], seeds: Sequence[int], folder: Path, budget: Any, costs: Any
) -> dict[tuple[str, int], Job]:
    """Return the job of each method and seed."""
    problems, jobs = [], {}
    names = split_list([methods] if isinstance(methods, str) else methods)
    if not names or not seeds:
        problems.append("give at least one method, and one seed")
    problems += [f"{name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for text in dict.fromkeys(names):
        try:
            name, settings = parsed(text)
            one = varied(job, settings)
            if costs is not None:
                one = costs.sized(one, budget)
        except JobError as error:
            problems += error.problems
            continue
        place = folder / re.sub(r"[^\w.=-]+", "-", name)
        for seed in seeds:
            training = one.training.__class__(**{**vars(one.training), "seed": seed})
            run = {"training": training, "folder": str(place / f"seed-{seed}")}
            jobs[name, seed] = one.model_copy(update=run)
    refuse(JobError, "the methods cannot be compared", problems)
    return jobs


def _concluded(
    job: Job, jobs: dict[tuple[str, int], Job], ended: dict[str, Ended], folder: Path
) -> Comparison:
    task = job.data.task
    metric = watched(job, task)
    rows, results = [], {key: ended[f"{key[0]}, seed {key[1]}"] for key in jobs}
    done = [how.result for how in results.values() if how.result is not None]
    if not done:
        reasons = dict.fromkeys(how.reason for how in results.values())
        raise JobError("no run was completed", list(reasons))
    has_valid = any(result["after"] for result in done)
    named = metrics_of(task, job.training.metrics)
    metrics = [metric, *(name for name in named if name != metric)] if has_valid else []
    if "accuracy" in metrics and job.training.watch is None:  # what readers look for first
        metrics.sort(key=lambda name: name != "accuracy")
        metric = "accuracy"
    for name in dict.fromkeys(name for name, _ in jobs):
        own = [how for (other, _), how in results.items() if other == name]
        found = [how.result for how in own if how.result is not None]
        values = {m: Spread.of(r["after"].get(m) for r in found) for m in metrics}
        values |= {cost: Spread.of(r.get(cost) for r in found) for cost in _COSTS}
        folders = tuple(Path(one.folder) for (other, _), one in jobs.items() if other == name)
        rows.append(Compared(name, folders, values, tuple(h.reason for h in own if not h.result)))
    sign = -1 if is_higher_better(metric) else 1
    if has_valid:
        rows.sort(key=lambda row: _last_if_nan(sign * row.values[metric].mean))
    made = Comparison(metric, tuple(rows), folder, tuple(metrics))
    _write(made, results)
    return made


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _cost(name: str, spread: Spread) -> str:
    if not spread.values:
        return "-"
    if name == "trained":
        return f"{spread.mean:,.0f}"
    factor = _FACTORS.get(name, 1.0)
    if name == "megabytes":
        return f"{spread.mean:.4g}"
    return str(Spread.of(value * factor for value in spread.values))


def _write(made: Comparison, results: dict[tuple[str, int], Ended]) -> None:
    folder, header_rows = made.folder, made.table()
    write_text(folder / "comparison.txt", f"{made}\n")
    numbers = [*made.metrics, *_COSTS]
    rows = []
    for row in made.rows:
        cells: dict[str, Any] = {"method": row.name, "runs": len(row.folders) - len(row.failures)}
        for name in numbers:
            cells |= {
                f"{name}_mean": row.values[name].mean,
                f"{name}_std": row.values[name].deviation,
            }
        rows.append(cells)
    write_text(folder / "comparison.csv", _csv(rows))
    runs = [
        {"method": name, "seed": seed, **{m: how.result["after"].get(m) for m in made.metrics},
         **{cost: how.result.get(cost) for cost in _COSTS}}
        for (name, seed), how in results.items() if how.result is not None
    ]  # fmt: skip
    write_text(folder / "runs.csv", _csv(runs))
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


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


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
