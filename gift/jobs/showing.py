"""A run as text."""

import csv
from pathlib import Path

from tabulate import tabulate

from gift.jobs.errors import shown
from gift.jobs.runs import Run
from gift.training.logs import TEXT_LOG
from gift.training.report import summary
from gift.training.result import RESULT

_FILES = {
    "best.safetensors": "the best delta", "last.safetensors": "the last delta",
    "checkpoint.pt": "what a resumed run needs", "report.html": "the report",
    "history.csv": "each epoch", "steps.csv": "each step", "log.txt": "what the run said",
    "damaged.txt": "examples that were left out", "job.yaml": "the job",
}  # fmt: skip


def run_text(run: Run, everything: bool = False) -> str:
    """Describe a run: what it trains on what, how far it is, what it reached.

    Args:
        run: the run.
        everything: whether to list all epochs, not the last ones.
    """
    network = "given in code" if run.job.network is None else run.job.network.name
    rows = [
        ("network", network), ("examples", f"{run.job.data.kind}, {shown(run.job.data.train)}"),
        ("strategy", run.job.strategy.name), ("classes", ", ".join(run.classes or ()) or "-"),
    ]  # fmt: skip
    parts = [tabulate(rows, tablefmt="plain", disable_numparse=True)]
    if (run.folder / RESULT).is_file():
        parts.append(summary(run.result))
    else:
        parts.append("the run has not ended: gift finetune resumes it")
    limit = None if everything else 5
    parts += [_epochs(run.folder / "history.csv", limit), _last_lines(run.folder / TEXT_LOG, limit)]
    here = [(n, what) for n, what in _FILES.items() if (run.folder / n).is_file()]
    parts.append(tabulate(here, tablefmt="plain"))
    return "\n\n".join(part for part in parts if part)


def _epochs(path: Path, limit: int | None) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return tabulate(rows[-limit:] if limit else rows, headers="keys") if rows else ""


def _last_lines(path: Path, limit: int | None) -> str:
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-limit:] if limit else lines)
