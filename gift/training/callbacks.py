"""Callbacks: code that a run calls during training. Logs and trackers are callbacks, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gift.training.run import TrainingRun

Row = Mapping[str, float]


class Callback:
    """Code that `finetune` calls; a subclass overrides the methods that it needs.

    Each method gets the run, with ``run.net``, ``run.epoch`` (finished epochs), ``run.step``
    (finished steps), ``run.optimizer``, ``run.result`` (everything so far), ``run.settings`` and
    ``run.processes``. ``run.stop("reason")`` ends the training after the current epoch. With
    several processes, the callbacks of each process are called; ``run.processes.first`` says
    whether it is the one that writes. An error in a callback ends the run, and keeps its last
    checkpoint.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift.training import Callback, finetune
        >>> class Enough(Callback):
        ...     def on_epoch_end(self, run, row):
        ...         if row["train_loss"] < 10:
        ...             run.stop("it is good enough")
        >>> inputs, labels = torch.randn(8, 4), torch.arange(8) % 2
        >>> result = finetune(
        ...     nn.Linear(4, 2), (inputs, labels), callbacks=[Enough()], device="cpu",
        ...     progress=False,
        ... )
        >>> len(result.history), result.stopped
        (1, 'it is good enough')
    """

    def on_train_begin(self, run: TrainingRun) -> None:
        """Called before the first step, or before the first one of a resumed run."""

    def on_epoch_begin(self, run: TrainingRun) -> None:
        """Called before the first step of each epoch, after the schedule unfroze its blocks."""

    def on_step_end(self, run: TrainingRun, row: Row) -> None:
        """Called after each optimizer step.

        Args:
            run: the run.
            row: "step" (from 1), "loss", "lr" and so on, as in `Result.steps`.
        """

    def on_epoch_end(self, run: TrainingRun, row: Row) -> None:
        """Called after each epoch and its evaluation.

        Args:
            run: the run.
            row: "epoch" (from 1), "train_loss" and so on, as in `Result.history`.
        """

    def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
        """Called after a checkpoint was written, in the process that wrote it."""

    def on_message(self, run: TrainingRun, text: str) -> None:
        """Called with what a user should know, such as where a run resumes."""

    def on_train_end(self, run: TrainingRun) -> None:
        """Called when ``run.result`` is complete, before the report is written."""

    def close(self) -> None:
        """Called last, also if the run was interrupted or refused to go on."""


class Callbacks(Callback):
    """Several callbacks as one; methods are called in the order of the callbacks.

    Args:
        callbacks: the callbacks.

    Raises:
        TypeError: if one is not a `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)
        for one in self.callbacks:
            if not isinstance(one, Callback):
                raise TypeError(
                    f"expected callbacks that derive from gift.training.Callback, got {one!r}"
                )

    def on_train_begin(self, run: TrainingRun) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_train_begin(run)

    def on_epoch_begin(self, run: TrainingRun) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_epoch_begin(run)

    def on_step_end(self, run: TrainingRun, row: Row) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_step_end(run, row)

    def on_epoch_end(self, run: TrainingRun, row: Row) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_epoch_end(run, row)

    def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_checkpoint(run, path)

    def on_message(self, run: TrainingRun, text: str) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_message(run, text)

    def on_train_end(self, run: TrainingRun) -> None:
        """Call all callbacks."""
        for one in self.callbacks:
            one.on_train_end(run)

    def close(self) -> None:
        """Close all callbacks, even if one of them raises."""
        left = self.callbacks
        while left:
            one, *left = left
            try:
                one.close()
            except BaseException:
                Callbacks(left).close()
                raise
