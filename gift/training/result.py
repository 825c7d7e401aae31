"""The result of a run, as plain data for the report."""

from dataclasses import dataclass, field
from pathlib import Path

from gift.training.drawings import Sample


@dataclass(repr=False)
class Result:
    """Result of `finetune`.

    Args:
        network: class of the network.
        strategy: description of the strategy.
        schedule: description of the schedule; "" if there was none.
        task: name of the task.
        classes: names of the classes; None if there are none.
        trained: number of trained parameters at the end.
        total: number of all parameters.
        history: a row for each epoch: "epoch" (from 1), "train_loss", "step" (the last one in it),
            "seconds", and, with validation, "valid_loss" and "valid_" with the name of each
            metric.
        steps: a row for each step of the optimizer: "step" (from 1), "loss", and "lr" of the first
            group, "lr_1" of the second, and so on.
        unfrozen: blocks that the schedule unfroze in each epoch (from 1).
        before, after: metrics, with "loss", on the validation examples, before and after training.
        old_before, old_after: the same on the old task; empty if no old task was given. A drop
            here is forgetting.
        confusion: how often a class (row) was predicted as another (column), after training.
        samples: drawings of some validation examples and of what the network says of them, after
            training; for images with masks or boxes.
        best_epoch: epoch (from 1) with the best values; None without validation.
        stopped: reason why training ended: "done", or a sentence.
        skipped: why examples were left out, for each of them.
        folder: folder with the files of the run; None if nothing was written.
    """

    network: str
    strategy: str
    schedule: str = ""
    task: str = "classification"
    classes: tuple[str, ...] | None = None
    trained: int = 0
    total: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    unfrozen: dict[int, list[str]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    old_before: dict[str, float] = field(default_factory=dict)
    old_after: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] | None = None
    samples: list[Sample] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = "done"
    skipped: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __repr__(self) -> str:
        from gift.training.report import summary  # which imports this module

        return summary(self)
