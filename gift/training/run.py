"""A run of training: what it needs, and what changes while it goes on."""

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

from gift.core.network import frozen_names
from gift.errors import TrainingError
from gift.schedules import Schedule
from gift.training.distributed import Processes, sharded_like, whole
from gift.training.loading import Batches
from gift.training.logs import Logs
from gift.training.metrics import MetricKind
from gift.training.result import Result
from gift.training.settings import Settings
from gift.training.tasks import Task

Old = Callable[[], dict[str, float]]
TRAIN, VALID = "the training examples", "the validation examples"


@dataclass
class Run:
    """A run of training.

    Args:
        net: the network, which is being fine-tuned.
        task: what a batch is.
        settings: how it is trained.
        processes: who takes part.
        train: batches to learn from.
        valid: batches to judge by, if there are any.
        old: tells what the network can still do of its old task, if that is asked for.
        metrics: what is computed on `valid`.
        schedule: what is frozen when, if there is a schedule.
        optimizer: of what is trained.
        rates: how its learning rate goes.
        scaler: of the loss, for float16.
        logs: what is written down.
        result: what is told in the end.
        identity: what a checkpoint must agree on, to go on from it.
        seed: of the order of the examples.
        epoch: those that are done.
        steps_done: steps that are done in the one that is not.
        step: steps of the optimizer that are done.
        totals: sum and count of the losses in the epoch.
        best: the best value of what is watched.
        best_state: the trained values then.
        waited: epochs since then.
        finished: whether nothing is left to do.
        epoch_random: states of the random numbers at the start of the epoch, of all processes.
        model: what is called for training; None until it is made.
        clock: when the epoch began.
    """

    net: nn.Module
    task: Task
    settings: Settings
    processes: Processes
    train: Batches
    valid: Batches | None
    old: Old | None
    metrics: Mapping[str, MetricKind]
    schedule: Schedule | None
    optimizer: Optimizer
    rates: LRScheduler
    scaler: torch.amp.GradScaler
    logs: Logs
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
        """Steps of the optimizer in an epoch."""
        return self.train.steps(self.settings.accumulate)

    @property
    def folder(self) -> Path | None:
        """Where this process writes, if it does."""
        return self.result.folder if self.processes.first else None

    def autocast(self) -> AbstractContextManager[Any]:
        """What the network computes in."""
        if self.settings.precision == "float32":
            return nullcontext()
        dtype = getattr(torch, self.settings.precision)
        return torch.autocast(self.processes.device.type, dtype)

    def watched(self, row: Mapping[str, float]) -> float:
        """The value of what is watched in a row of the history."""
        return row[f"valid_{self.settings.watch or self.task.watch}"]

    def is_better(self, value: float) -> bool:
        """Whether it is better than the best so far."""
        if math.isnan(value) or math.isnan(self.best):
            return not math.isnan(value)
        kind = self.metrics.get(self.settings.watch or self.task.watch)
        return value > self.best if kind is not None and kind.higher else value < self.best

    def check_watch(self) -> None:
        """Whether what is watched can be watched.

        Raises:
            TrainingError: if it cannot.
        """
        watch = self.settings.watch or self.task.watch
        if self.valid is None:
            if self.settings.patience is not None or self.settings.watch is not None:
                raise TrainingError("patience and watch need examples to validate on: give valid")
        elif watch not in self.metrics and (watch != "loss" or self.task.watch != "loss"):
            known = [*(["loss"] if self.task.watch == "loss" else []), *self.metrics]
            raise TrainingError(f"watch is {watch!r}, expected one of {known}")


def trained_state(net: Any) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers, whole and on the CPU; all processes call this."""
    frozen = set(frozen_names(net))
    tensors = {n: v for n, v in net.state_dict().items() if isinstance(v, Tensor)}
    return {name: whole(value) for name, value in tensors.items() if name not in frozen}


def put_state(net: Any, state: Mapping[str, Tensor]) -> None:
    """Give the network values that `trained_state` gave."""
    named = dict(net.named_parameters(remove_duplicate=False))
    named |= dict(net.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, value in state.items():
            named[name].copy_(sharded_like(value, named[name]))
