"""What a run has written so far, read from its folder while it runs."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path


def reported_values(folder: Path, metric: str, after: int = 0) -> Iterator[tuple[int, float]]:
    """Yield the epochs of a run, from 1, and the value of a metric after each.

    Args:
        folder: folder of the run.
        metric: name of the metric.
        after: epochs up to this one are left out.
    """
    try:
        text = (folder / "history.csv").read_text(encoding="utf-8")
    except OSError:
        return
    whole = text[: text.rfind("\n") + 1]  # a line may be half written
    for row in csv.DictReader(whole.splitlines()):
        try:
            epoch, value = int(row["epoch"]), float(row[f"valid_{metric}"])
        except (KeyError, TypeError, ValueError):
            continue
        if epoch > after and not math.isnan(value):
            yield epoch, value


def progress_of(folder: Path | None) -> str:
    """Return how far a run is, from its last complete row: ``epoch 3, loss 0.41``."""
    try:
        text = (folder / "history.csv").read_text(encoding="utf-8") if folder else ""
    except OSError:
        return ""
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    if not rows:
        return ""
    row = rows[-1]
    shown = row.get("valid_loss") or row.get("train_loss") or ""
    try:
        return f"epoch {row['epoch']}, loss {float(shown):.4g}"
    except (KeyError, ValueError):
        return f"epoch {row.get('epoch', '?')}"
