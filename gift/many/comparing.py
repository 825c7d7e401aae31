"""`compare`: one job with several methods and seeds, as a table with mean and spread."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gift.errors import JobError, refuse
from gift.jobs.models import Job
from gift.jobs.reading import read_job
from gift.many.batch import Ended, run_all
from gift.many.comparison import COSTS, Compared, Comparison, Spread, write_comparison
from gift.many.costs import Costs
from gift.many.engines.base import Engine
from gift.many.engines.local import Here, Processes
from gift.many.networks import counted_network
from gift.many.task import is_higher_better, watched
from gift.many.variants import parsed, split_list, varied
from gift.training.metrics import metrics_of


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

    def note(key: tuple[str, int], how: Ended) -> None:
        name, done = f"{key[0]}, seed {key[1]}", " (was done)" if how.was_done else ""
        tell(f"{name} failed: {how.reason}" if how.result is None else f"{name} is done{done}")

    results = run_all(jobs, engine, note, parallel)
    return _concluded(made, jobs, results, folder)


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
    job: Job, jobs: dict[tuple[str, int], Job], results: dict[tuple[str, int], Ended], folder: Path
) -> Comparison:
    done = [how.result for how in results.values() if how.result is not None]
    if not done:
        reasons = dict.fromkeys(how.reason for how in results.values())
        raise JobError("no run was completed", list(reasons))
    has_valid = any(result["after"] for result in done)
    metric, *others = _metrics(job) if has_valid else [watched(job, job.data.task)]
    metrics = [metric, *others] if has_valid else []
    rows = []
    for name in dict.fromkeys(name for name, _ in jobs):
        own = [how for (other, _), how in results.items() if other == name]
        found = [how.result for how in own if how.result is not None]
        values = {m: Spread.of(r["after"].get(m) for r in found) for m in metrics}
        values |= {cost: Spread.of(r.get(cost) for r in found) for cost in COSTS}
        folders = tuple(Path(one.folder) for (other, _), one in jobs.items() if other == name)
        rows.append(Compared(name, folders, values, tuple(h.reason for h in own if not h.result)))
    sign = -1 if is_higher_better(metric) else 1
    if has_valid:
        rows.sort(key=lambda row: _last_if_nan(sign * row.values[metric].mean))
    made = Comparison(metric, tuple(rows), folder, tuple(metrics))
    write_comparison(made, results)
    return made


def _metrics(job: Job) -> list[str]:
    """Return the names of the metrics of a job; the one that orders methods comes first."""
    watch, named = watched(job, job.data.task), metrics_of(job.data.task, job.training.metrics)
    metrics = [watch, *(name for name in named if name != watch)]
    if job.training.watch is None:  # readers look for the accuracy first
        metrics.sort(key=lambda name: name != "accuracy")
    return metrics


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
