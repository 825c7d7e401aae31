"""A training run: what it needs, and its state while it is running."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gift.core.state_settings import without_settings
from gift.core.trained import frozen_names
from gift.errors import TrainingError
from gift.schedules import RankAllocator, Schedule
from gift.training.callbacks import Callback
from gift.training.distributed import Processes, sharded_like, whole
from gift.training.loading import Batches
from gift.training.metrics import MetricKind
from gift.training.result import Result
from gift.training.settings import Settled
from gift.training.tasks import Task

Old = Callable[[], dict[str, float]]
TRAIN, VALID = "the training examples", "the validation examples"


@dataclass
class TrainingRun:
    """A training run and its state.

    Args:
        net: the network that is being fine-tuned.
        task: task, which interprets the batches.
        settings: settings of the training.
        processes: the processes that take part.
        train: training batches.
        valid: validation batches, if there are any.
        old: returns metrics on the old task, if requested.
        metrics: metrics that are computed on `valid`.
        schedule: schedule of freezing and unfreezing, if there is one.
        allocator: allocator of ranks, if there is one.
        optimizer: optimizer of the trained parameters.
        rates: learning rate scheduler.
        scaler: gradient scaler for float16.
        callbacks: the callbacks of the run, including logs.
        result: result to return in the end.
        identity: description of the run, which a checkpoint must match to be resumed.
        seed: seed of the order of the examples.
        epoch: number of finished epochs.
        steps_done: number of finished steps in the current epoch.
        step: number of finished optimizer steps.
        totals: sum and count of the losses in the epoch.
        best: best value of the watched metric.
        best_state: trained state at the best value.
        waited: number of epochs since then.
        finished: whether training has ended.
        epoch_random: random states of all processes at the start of the epoch.
        model: the network or its wrapper, as called for training; None until it is created.
        clock: time at which the epoch began.
    """

    net: nn.Module
    task: Task
    settings: Settled
    processes: Processes
    train: Batches
    valid: Batches | None
    old: Old | None
    metrics: Mapping[str, MetricKind]
    schedule: Schedule | None
    allocator: RankAllocator | None
    optimizer: Optimizer
    rates: LRScheduler
    scaler: torch.amp.GradScaler
    callbacks: Callback
    result: Result
    identity: dict[str, Any]
    seed: int
    epoch: int = 0
    steps_done: int = 0
    step: int = 0
    totals: tuple[float, float] = (0.0, 0.0)
    best: float = math.nan
    best_state: dict[str, Tensor] = field(default_factory=dict)
    waited: int = 0
    finished: bool = False
    epoch_random: list[Any] = field(default_factory=list)
    model: Any = None
    clock: float = field(default_factory=time.monotonic)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in an epoch."""
        return self.train.steps(self.settings.accumulate)

    @property
    def folder(self) -> Path | None:
        """The folder that this process writes to, or None if it does not write."""
        return self.result.folder if self.processes.first else None

    @property
    def checkpoint(self) -> Path | None:
        """The file of the checkpoint; None if the run has no folder."""
        return None if self.result.folder is None else self.result.folder / "checkpoint.pt"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context for the precision of the settings."""
        if self.settings.precision == "float32":
            return nullcontext()
        dtype = getattr(torch, self.settings.precision)
        return torch.autocast(self.processes.device.type, dtype)

    def say(self, text: str) -> None:
        """Tell the user something, on the screen and in the log."""
        self.callbacks.on_message(self, text)

    def stop(self, reason: str) -> None:
        """End the training after the current epoch, for a reason that the result then states."""
        self.result.stopped = reason

    def watched(self, row: Mapping[str, float]) -> float:
        """Return the watched value in a row of the history."""
        return row[f"valid_{self.settings.watch or self.task.watch}"]

    def is_better(self, value: float) -> bool:
        """Whether a value is better than the best so far."""
        if math.isnan(value) or math.isnan(self.best):
            return not math.isnan(value)
        kind = self.metrics.get(self.settings.watch or self.task.watch)
        return value > self.best if kind is not None and kind.higher else value < self.best

    def check_watch(self) -> None:
        """Check that the watched metric is computed.

        Raises:
            TrainingError: if it is not.
        """
        watch = self.settings.watch or self.task.watch
        if self.valid is None:
            if self.settings.patience is not None or self.settings.watch is not None:
                raise TrainingError("patience and watch need examples to validate on: give valid")
        elif watch not in self.metrics and (watch != "loss" or self.task.watch != "loss"):
            known = [*(["loss"] if self.task.watch == "loss" else []), *self.metrics]
            raise TrainingError(f"watch is {watch!r}, expected one of {known}")


def trained_state(net: Any) -> dict[str, Tensor]:
    """Return full trained parameters and buffers on the CPU; all processes must call this."""
    frozen = set(frozen_names(net))
    state = without_settings(net.state_dict())
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: whole(value) for name, value in tensors.items() if name not in frozen}


def put_state(net: Any, state: Mapping[str, Tensor]) -> None:
    """Load the values that `trained_state` returned into the network."""
    named = dict(net.named_parameters(remove_duplicate=False))
    named |= dict(net.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, value in without_settings(state).items():  # older checkpoints have them
            named[name].copy_(sharded_like(value, named[name]))
