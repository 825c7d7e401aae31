"""The tasks, one file for each: how they compute losses from batches, and check batches."""

from gift.training.tasks.base import Loss, Task, accepted, keywords_of, main_output
from gift.training.tasks.classification import Classification, MultiLabel
from gift.training.tasks.contrastive import Contrastive
from gift.training.tasks.detection import Detection
from gift.training.tasks.distillation import Distillation
from gift.training.tasks.language import Language
from gift.training.tasks.regression import Regression
from gift.training.tasks.segmentation import Segmentation
from gift.training.tasks.undecided import Undecided

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Classification, MultiLabel, Language, Regression, Segmentation, Detection, Contrastive
    )
}  # fmt: skip
"""Tasks by name."""

__all__ = [
    "TASKS",
    "Classification",
    "Contrastive",
    "Distillation",
    "Loss",
    "Task",
    "Undecided",
    "accepted",
    "keywords_of",
    "main_output",
]
