"""What a run gave, as plain data that the report is drawn from."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(repr=False)
class Result:
    """What `finetune` did.

    Args:
        network: class of the network.
        strategy: what was trained, as text.
        schedule: when, as text; "" if there was none.
        task: "classification", "language", "detection" or "regression".
        classes: names of the classes, None where there are none.
        trained: trained parameters at the end.
        total: all parameters.
        history: a row for each epoch: "epoch" (from 1), "train_loss", "step" (the last one in it),
            "seconds", and, with validation, "valid_loss" and "valid_" with the name of each metric.
        steps: a row for each step of the optimizer: "step" (from 1), "loss", and "lr" of the first
            group, "lr_1" of the second ... .
        unfrozen: for each epoch (from 1) the blocks that the schedule unfroze then.
        before, after: metrics, with "loss", on the validation examples, before and after.
        old_before, old_after: the same on the old task, empty if none was given. What is lost
            there is forgotten.
        confusion: how often (row) a class was taken for (column) another; after training.
        best_epoch: the epoch (from 1) whose values are the best; None without validation.
        stopped: why it ended: "done", or a sentence.
        folder: where the files of the run are; None if nothing was written.
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
    best_epoch: int | None = None
    stopped: str = "done"
    folder: Path | None = None

    def __repr__(self) -> str:
        from gift.training.report import summary  # which is drawn from results

        return summary(self)
