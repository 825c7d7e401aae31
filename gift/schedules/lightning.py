"""Schedules and rank allocators in the Lightning Trainer."""

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from gift.schedules.base import Schedule
from gift.schedules.ranks import RankAllocator


def _lightning() -> Any:
    """Import Lightning under the one of its two names that is already imported, or installed."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise ImportError("this needs Lightning: pip install lightning")


class ScheduleCallback(_lightning().Callback):  # type: ignore[misc]  # its module is found when it is used
    """Callback that lets a schedule drive a Lightning run, including its checkpoints.

    The schedule is attached to the LightningModule, unless it is attached already. The module may
    itself be fine-tuned by a strategy, or contain a network that is. With several optimizers, the
    schedule drives the one with the parameters of the head.

    Args:
        schedule: the schedule.

    Example:
        >>> from gift.schedules import FreezeUnfreeze
        >>> from gift.schedules.lightning import ScheduleCallback
        >>> callback = ScheduleCallback(FreezeUnfreeze(unfreeze_epoch=2))
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._waiting: dict[str, Any] | None = None  # a state whose optimizer does not exist yet

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the schedule, and unfreeze a checkpoint's blocks before its values are loaded."""
        if not self.schedule.is_attached:
            self.schedule.attach(pl_module)
        plain = pl_module.on_load_checkpoint

        @functools.wraps(plain)
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                self.schedule.load_state_dict(state)
                self._waiting = state
            plain(checkpoint)

        pl_module.__dict__["on_load_checkpoint"] = on_load_checkpoint

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hook that `setup` added to the module."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Arrange the groups of the new optimizer before its state is loaded."""
        if self._waiting is not None:
            self.schedule.load_state_dict(self._waiting, self._optimizer(trainer))
            self._waiting = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Unfreeze what is due."""
        self.schedule.step(trainer.current_epoch, self._optimizer(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, for the checkpoint."""
        return self.schedule.state_dict()

    def _optimizer(self, trainer: Any) -> Any:
        """Return the first optimizer that has a trained parameter of the head."""
        head = {id(parameter) for parameter in self.schedule.head_parameters()}
        for optimizer in trainer.optimizers:
            if any(id(p) in head for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        return trainer.optimizers[0]


class RankAllocatorCallback(_lightning().Callback):  # type: ignore[misc]  # as above
    """Callback that lets a rank allocator drive a Lightning run, including its checkpoints.

    The allocator is attached to the LightningModule, unless it is attached already. Where it has no
    `total_steps`, those of the Trainer count. The gradients of the orthogonality are added to those
    of the loss before each step of the optimizer. The module must optimise automatically.

    Args:
        allocator: the allocator.

    Example:
        >>> from gift.schedules import RankAllocator
        >>> from gift.schedules.lightning import RankAllocatorCallback
        >>> callback = RankAllocatorCallback(RankAllocator(target_rank=4, warmup_steps=100))
    """

    def __init__(self, allocator: RankAllocator) -> None:
        self.allocator = allocator
        self._waiting: dict[str, Any] | None = None  # a state that came before the network
        self._steps = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the allocator, and continue where a checkpoint was written."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "the module optimises by hand: call allocator.add_gradients() before the "
                "optimizer's step and allocator.step() after it instead of the callback"
            )
        if not self.allocator.is_attached:
            total = self.allocator.total_steps or trainer.estimated_stepping_batches
            if total == float("inf"):
                raise ValueError("the Trainer has no end: give the allocator its total_steps")
            self.allocator.attach(pl_module, int(total))
        if self._waiting is not None:
            self.allocator.load_state_dict(self._waiting)
            self._waiting = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note how many steps are done."""
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradients of the orthogonality."""
        self.allocator.add_gradients()

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        """Allocate after a step of the optimizer."""
        if trainer.global_step != self._steps:  # not while gradients are accumulated
            self._steps = trainer.global_step
            self.allocator.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the allocator, for the checkpoint."""
        return self.allocator.state_dict() if self.allocator.is_attached else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the allocator is attached."""
        self._waiting = state_dict or None
