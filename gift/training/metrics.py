"""Metrics by name, computed by torchmetrics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gift.data.examples import IGNORED
from gift.errors import TrainingError, closest
from gift.support.optional import require


class MetricKind(NamedTuple):
    """A metric.

    Args:
        task: task that the metric belongs to.
        make: creates the torchmetrics metric from the number of classes and torchmetrics' own
            options.
        higher: whether higher is better.
        default: whether it is computed by default.
    """

    task: str
    make: Callable[..., Any]
    higher: bool = True
    default: bool = True


def _classified(kind: str, **settings: Any) -> Callable[..., Any]:
    def make(classes: int, **options: Any) -> Any:
        metrics = require("torchmetrics.classification", "train")
        return getattr(metrics, f"Multiclass{kind}")(
            classes, ignore_index=IGNORED, validate_args=False, **settings, **options
        )

    return make


def _regressed(kind: str, **settings: Any) -> Callable[..., Any]:
    def make(classes: int, **options: Any) -> Any:
        return getattr(require("torchmetrics.regression", "train"), kind)(**settings, **options)

    return make


def _perplexity(classes: int, **options: Any) -> Any:
    plain: Any = require("torchmetrics.text", "train").Perplexity

    class OfPlaces(plain):
        """Takes positions as one flat sequence, as other metrics do."""

        def update(self, preds: Any, target: Any) -> None:
            super().update(preds[None], target[None])

    return OfPlaces(ignore_index=IGNORED, **options)


def _determined(classes: int, **options: Any) -> Any:
    plain: Any = require("torchmetrics.regression", "train").R2Score

    class Determined(plain):
        """R2 that is nan for a single target, which has no variance to explain."""

        def compute(self) -> Any:
            return super().compute() if self.total > 1 else self.residual * float("nan")

    return Determined(**options)


def _detected(classes: int, **options: Any) -> Any:
    require("pycocotools", "detection")
    return require("torchmetrics.detection", "train").MeanAveragePrecision(**options)


confusion_matrix = _classified("ConfusionMatrix")
"""Counts of how often a class (row) was predicted as another (column)."""

METRICS = {
    "accuracy": MetricKind("classification", _classified("Accuracy", average="micro")),
    "f1": MetricKind("classification", _classified("F1Score", average="macro")),
    "precision": MetricKind("classification", _classified("Precision", average="macro")),
    "recall": MetricKind("classification", _classified("Recall", average="macro")),
    "auroc": MetricKind("classification", _classified("AUROC"), default=False),
    "top5": MetricKind(
        "classification", _classified("Accuracy", average="micro", top_k=5), default=False
    ),
    "perplexity": MetricKind("language", _perplexity, higher=False),
    "token_accuracy": MetricKind("language", _classified("Accuracy", average="micro")),
    "mae": MetricKind("regression", _regressed("MeanAbsoluteError"), higher=False),
    "rmse": MetricKind("regression", _regressed("MeanSquaredError", squared=False), higher=False),
    "r2": MetricKind("regression", _determined),
    "map": MetricKind("detection", _detected),
}
"""Metrics that `finetune` can compute, by name.

F1, precision and recall are macro averages over the classes.
"""


def metrics_of(task: str, names: Sequence[str] | None) -> dict[str, MetricKind]:
    """Return the metrics with these names, or the default metrics of the task.

    Raises:
        TrainingError: naming all names that are not metrics of the task.
    """
    own = {name: kind for name, kind in METRICS.items() if kind.task == task}
    if names is None:
        return {name: kind for name, kind in own.items() if kind.default}
    problems = [
        f"{name!r} is not a metric of {task}, closest: {closest(name, own)}; known: {sorted(own)}"
        for name in names
        if name not in own
    ]
    if problems:
        raise TrainingError("; ".join(problems))
    return {name: own[name] for name in names}
