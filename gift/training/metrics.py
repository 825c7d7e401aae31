"""Metrics by task and name, computed by torchmetrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift.data.examples import IGNORED
from gift.errors import TrainingError, closest
from gift.support.optional import require


class MetricKind(NamedTuple):
    """A metric.

    Args:
        make: creates the torchmetrics metric from the number of classes and torchmetrics' own
            options.
        higher: whether higher is better.
        default: whether it is computed by default.
    """

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


def _labelled(kind: str, **settings: Any) -> Callable[..., Any]:
    def make(classes: int, **options: Any) -> Any:
        metrics = require("torchmetrics.classification", "train")
        return getattr(metrics, f"Multilabel{kind}")(
            classes, validate_args=False, **settings, **options
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
    made = require("torchmetrics.detection", "train").MeanAveragePrecision
    return made(class_metrics=True, **options)


def scalars(
    name: str, value: Any, classes: Sequence[str] | None, in_detail: bool
) -> dict[str, float]:
    """Return what a metric computed as numbers by name.

    Mean average precision gives several: "map", "map_50", and in detail one for each class that
    there are objects of, "map of cat".

    Args:
        name: name of the metric.
        value: what torchmetrics computed.
        classes: names of the classes.
        in_detail: whether to return those of each class.
    """
    if not isinstance(value, Mapping):
        return {name: float(value)}
    found = {key: float(value[key]) for key in ("map", "map_50")}
    if in_detail:
        each = value["map_per_class"].flatten().tolist()
        for number, score in zip(value["classes"].flatten().tolist(), each, strict=False):
            known = classes is not None and number < len(classes)
            label = classes[number] if known and classes is not None else str(number)
            if score >= 0:  # -1 without objects
                found[f"map of {label}"] = float(score)
    return found


def _nearest(classes: int, **options: Any) -> Any:
    """How often the nearest other vector, by cosine, is of the same class.

    Examples without another one of their class do not count.
    """
    base: Any = require("torchmetrics", "train").Metric
    join = require("torchmetrics.utilities", "train").dim_zero_cat

    class RecallAt1(base):
        """Keeps all vectors, and compares them in the end."""

        full_state_update = False
        higher_is_better = True

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.add_state("vectors", default=[], dist_reduce_fx="cat")
            self.add_state("targets", default=[], dist_reduce_fx="cat")

        def update(self, vectors: Tensor, targets: Tensor) -> None:
            self.vectors.append(torch.nn.functional.normalize(vectors, dim=1))
            self.targets.append(targets)

        def compute(self) -> Tensor:
            vectors, targets = join(self.vectors), join(self.targets)
            right = count = 0
            for start in range(0, len(vectors), 1024):
                rows = slice(start, start + 1024)
                near = vectors[rows] @ vectors.T
                at = torch.arange(len(near), device=near.device)
                near[at, at + start] = -torch.inf
                same = targets[rows, None] == targets
                same[at, at + start] = False
                known = same.any(1) & (targets[rows] != IGNORED)
                best = same[at, near.argmax(1)]
                right, count = right + int((best & known).sum()), count + int(known.sum())
            share = right / count if count else float("nan")
            return torch.tensor(share, device=vectors.device)

    return RecallAt1(**options)


confusion_matrix = _classified("ConfusionMatrix")
"""Counts of how often a class (row) was predicted as another (column)."""

METRICS: dict[str, dict[str, MetricKind]] = {
    "classification": {
        "accuracy": MetricKind(_classified("Accuracy", average="micro")),
        "f1": MetricKind(_classified("F1Score", average="macro")),
        "precision": MetricKind(_classified("Precision", average="macro")),
        "recall": MetricKind(_classified("Recall", average="macro")),
        "auroc": MetricKind(_classified("AUROC"), default=False),
        "top5": MetricKind(_classified("Accuracy", average="micro", top_k=5), default=False),
    },
    "multi_label": {
        "accuracy": MetricKind(_labelled("Accuracy", average="micro")),
        "exact_match": MetricKind(_labelled("ExactMatch")),
        "f1": MetricKind(_labelled("F1Score", average="macro")),
        "precision": MetricKind(_labelled("Precision", average="macro"), default=False),
        "recall": MetricKind(_labelled("Recall", average="macro"), default=False),
        "auroc": MetricKind(_labelled("AUROC"), default=False),
    },
    "language": {
        "perplexity": MetricKind(_perplexity, higher=False),
        "token_accuracy": MetricKind(_classified("Accuracy", average="micro")),
    },
    "regression": {
        "mae": MetricKind(_regressed("MeanAbsoluteError"), higher=False),
        "rmse": MetricKind(_regressed("MeanSquaredError", squared=False), higher=False),
        "r2": MetricKind(_determined),
    },
    "segmentation": {
        "miou": MetricKind(_classified("JaccardIndex", average="macro")),
        "dice": MetricKind(_classified("F1Score", average="macro")),
        "pixel_accuracy": MetricKind(_classified("Accuracy", average="micro")),
    },
    "contrastive": {"recall_at_1": MetricKind(_nearest)},
    "detection": {"map": MetricKind(_detected)},
}
"""Metrics that `finetune` can compute, by task and name.

F1, precision and recall are macro averages over the classes. For several labels, accuracy is the
share of right decisions over all classes, exact match the share of examples without a wrong one.
The mean IoU and Dice of segmentation are those of all pixels of a data set, not of each image; the
mean is over the classes that are there or predicted. Recall at 1 is how often the nearest other
vector is of the same class or pair.
"""


def metrics_of(task: str, names: Sequence[str] | None) -> dict[str, MetricKind]:
    """Return the metrics with these names, or the default metrics of the task.

    Raises:
        TrainingError: naming all names that are not metrics of the task.
    """
    own = METRICS[task]
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
