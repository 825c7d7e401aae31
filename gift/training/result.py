"""The result of a run, as plain data for the report."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gift.support.atomic_files import write_text
from gift.training.drawings import Sample
from gift.training.shown_examples import ShownExample


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
        shown: some validation examples, evenly spread, and what the network says of them; only
            with a folder, for its report.
        mistakes: the validation examples with the largest losses that were predicted wrongly.
        numbers: for regression, true and predicted numbers of validation examples, evenly spread;
            only with a folder.
        best_epoch: epoch (from 1) with the best values; None without validation.
        stopped: reason why training ended: "done", or a sentence.
        skipped: why examples were left out, for each of them.
        about: facts for the report by their section: the environment, the settings, the examples.
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
    shown: list[ShownExample] = field(default_factory=list)
    mistakes: list[ShownExample] = field(default_factory=list)
    numbers: list[tuple[float, float]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = "done"
    skipped: list[str] = field(default_factory=list)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    folder: Path | None = None

    def __repr__(self) -> str:
        from gift.training.report import summary  # which imports this module

        return summary(self)

    def _repr_html_(self) -> str:
        from gift.training.report import summary_html

        return summary_html(self)


RESULT = "result.json"
_ELSEWHERE = ("steps", "samples", "shown", "mistakes", "numbers", "folder")
"""Fields that are in other files, or depend on where the folder is."""


def write_result(result: Result, folder: Path) -> None:
    """Write a result as ``result.json``, without steps and drawings."""
    names = [one.name for one in fields(result) if one.name not in _ELSEWHERE]
    plain = {name: getattr(result, name) for name in names}
    write_text(folder / RESULT, json.dumps(plain, ensure_ascii=False, indent=1) + "\n")


def read_result(folder: Path) -> Result:
    """Read what `write_result` wrote; entries that this version does not know are left out."""
    plain: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    known = {one.name for one in fields(Result)} - {*_ELSEWHERE}
    found = {name: value for name, value in plain.items() if name in known}
    found["classes"] = None if found.get("classes") is None else tuple(found["classes"])
    found["unfrozen"] = {int(epoch): names for epoch, names in found.get("unfrozen", {}).items()}
    return Result(**found, folder=folder)
