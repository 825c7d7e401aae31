"""Metrics by name, computed by torchmetrics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gift.data.examples import IGNORED
from gift.errors import TrainingError, closest
from gift.support.optional import require


class MetricKind(NamedTuple):
    """One metric.

    Args:
        task: to which it belongs.
        make: the metric of torchmetrics, for a number of classes; takes torchmetrics' own options.
        higher: whether more is better.
        default: whether it is computed without being asked for.
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
        """Takes places one after the other, as other metrics do."""

        def update(self, preds: Any, target: Any) -> None:
            super().update(preds[None], target[None])

    return OfPlaces(ignore_index=IGNORED, **options)


def _determined(classes: int, **options: Any) -> Any:
    plain: Any = require("torchmetrics.regression", "train").R2Score

    class Determined(plain):
        """Not a number where a single one is, of which no variance can be explained."""

        def compute(self) -> Any:
            return super().compute() if self.total > 1 else self.residual * float("nan")

    return Determined(**options)


def _detected(classes: int, **options: Any) -> Any:
    require("pycocotools", "detection")
    return require("torchmetrics.detection", "train").MeanAveragePrecision(**options)


confusion_matrix = _classified("ConfusionMatrix")
"""Counts of (row) a class being taken for (column) another."""

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
"""Every metric that `finetune` can be asked for, by its name. F1, precision and recall are means
over the classes."""


def metrics_of(task: str, names: Sequence[str] | None) -> dict[str, MetricKind]:
    """The metrics of these names, or those that the task has by default.

    Raises:
        TrainingError: naming all names that are no metric, or one of another task.
    """
    own = {name: kind for name, kind in METRICS.items() if kind.task == task}
    if names is None:
        return {name: kind for name, kind in own.items() if kind.default}
    problems = [
        f"{name!r} is no metric of {task}, closest: {closest(name, own)}, there are {sorted(own)}"
        for name in names
        if name not in own
    ]
    if problems:
        raise TrainingError("; ".join(problems))
    return {name: own[name] for name in names}
