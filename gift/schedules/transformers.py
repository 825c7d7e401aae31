"""Schedules and rank allocators in the transformers Trainer."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from gift.private.torch.calls import callers
from gift.schedules.base import Schedule
from gift.schedules.config import load_schedule_from_config
from gift.schedules.ranks import RankAllocator
from gift.support.optional import require

_callbacks: Any = require("transformers.trainer_callback", "text")

_KEY = "gift_schedule"  # key in optimizer states; optimizers ignore unknown keys
_RANKS = "gift_ranks"


class ScheduleCallback(_callbacks.TrainerCallback, _callbacks.ExportableState):
    """Callback that lets a schedule drive a transformers Trainer, including its checkpoints.

    Pass it to the constructor, ``Trainer(..., callbacks=[ScheduleCallback(schedule)])``, so that
    it knows the Trainer before a checkpoint is loaded. The schedule is attached to the model,
    unless it is attached already. With ``load_best_model_at_end``, parameters that were unfrozen
    after the best epoch get their base values back.

    Args:
        schedule: the schedule, or its plain data.

    Example:
        >>> from gift.schedules import FreezeUnfreeze
        >>> from gift.schedules.transformers import ScheduleCallback
        >>> callback = ScheduleCallback(FreezeUnfreeze(unfreeze_epoch=2))
    """

    def __init__(self, schedule: Schedule | dict[str, Any]) -> None:
        if not isinstance(schedule, Schedule):
            schedule = load_schedule_from_config(schedule)
        self.schedule: Schedule = schedule
        self.resumed: dict[str, Any] | None = None
        self._handles: list[Any] = []

    def state(self) -> dict[str, Any]:
        """Return the schedule and its state, for ``trainer_state.json``."""
        try:
            arguments = {"schedule": self.schedule.to_config()}
        except ValueError:  # a schedule that no config file can name
            arguments = {}
        state = self.schedule.state_dict() if self.schedule.is_attached else None
        return {"args": arguments, "attributes": {"resumed": state}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach the schedule, and hook the optimizer's creation, before it loads a state."""
        if model is not None and not self.schedule.is_attached:
            self.schedule.attach(model)
        if (trainer := _trainer()) is not None:
            before = functools.partial(self._before_state, trainer)
            _hook_optimizer(trainer, self._handles, self._with_state, before)

    def _with_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Record in the optimizer's state which groups it must have when it is loaded."""
        if self.schedule.is_attached:
            state[_KEY] = self.schedule.state_dict()

    def _before_state(self, trainer: Any, optimizer: Any, state: dict[str, Any]) -> None:
        """Give the optimizer the groups that it had, just before a state is loaded."""
        # Before transformers 5, the Trainer reads its own state after that of the optimizer.
        # Checkpoints that gift wrote before it used the key have the schedule in the Trainer's
        # state only.
        saved = state.get(_KEY) or _saved(trainer.state.stateful_callbacks)
        # accelerate loads the optimizer's own state first.
        if saved is not None and len(state["param_groups"]) > len(optimizer.param_groups):
            self.schedule.load_state_dict(saved, optimizer)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Attach if not attached yet, for example because the Trainer recreated this callback."""
        if not self.schedule.is_attached:
            self.schedule.attach(model)
            if self.resumed is not None:
                self.schedule.load_state_dict(self.resumed, kwargs["optimizer"])

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:  # fmt: skip
        """Unfreeze what is due."""
        self.schedule.step(int(state.epoch or 0), optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go back to the blocks of the best epoch, whose values were loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            file = Path(state.best_model_checkpoint) / "trainer_state.json"
            saved = _saved(json.loads(file.read_text(encoding="utf-8"))["stateful_callbacks"])
            if saved is not None:
                self.schedule.load_state_dict(saved)


class RankAllocatorCallback(_callbacks.TrainerCallback):
    """Callback that lets a rank allocator drive a transformers Trainer, including its checkpoints.

    Pass it to the constructor, ``Trainer(..., callbacks=[RankAllocatorCallback(allocator)])``. The
    allocator is attached to the model when training begins, unless it is attached already. Where it
    has no `total_steps`, those of the Trainer count. The gradients of the orthogonality are added
    to those of the loss before each step of the optimizer, after gradients were clipped.

    Args:
        allocator: the allocator.

    Example:
        >>> from gift.schedules import RankAllocator
        >>> from gift.schedules.transformers import RankAllocatorCallback
        >>> callback = RankAllocatorCallback(RankAllocator(target_rank=4, warmup_steps=100))
    """

    def __init__(self, allocator: RankAllocator) -> None:
        self.allocator = allocator
        self._handles: list[Any] = []
        self._trainer: Any = None
        self._waiting: dict[str, Any] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hook the optimizer's creation, whose state has that of the allocator."""
        self._trainer = _trainer()
        if self._trainer is not None:
            _hook_optimizer(self._trainer, self._handles, self._with_state, self._before_state)

    def _with_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        if self.allocator.is_attached:
            state[_RANKS] = self.allocator.state_dict()

    def _before_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        self._waiting = state.get(_RANKS, self._waiting)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Attach the allocator, and continue where a checkpoint was written."""
        if not self.allocator.is_attached:
            self.allocator.attach(model, self.allocator.total_steps or state.max_steps)
        if self._waiting is not None:
            self.allocator.load_state_dict(self._waiting)
            self._waiting = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the gradients of the orthogonality."""
        scaler = getattr(getattr(self._trainer, "accelerator", None), "scaler", None)
        if scaler is not None:
            # Clipping has unscaled float16's gradients already, if there is any.
            with contextlib.suppress(RuntimeError):
                self._trainer.accelerator.unscale_gradients()
        self.allocator.add_gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Allocate, while gradients are there."""
        self.allocator.step()


def _hook_optimizer(trainer: Any, handles: list[Any], after: Any, before: Any) -> None:
    """Let functions see the state of the optimizer that a Trainer creates: saved, to be loaded."""
    create = trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(*arguments: Any, **named: Any) -> Any:
        optimizer = create(*arguments, **named)
        for handle in handles:
            handle.remove()
        handles[:] = [
            optimizer.register_state_dict_post_hook(after),
            optimizer.register_load_state_dict_pre_hook(before),
        ]
        return optimizer

    trainer.create_optimizer = create_optimizer


def _trainer() -> Any:
    """Return the Trainer that is being constructed: callbacks are not told which one owns them."""
    trainer = require("transformers", "text").Trainer
    found = (frame.f_locals.get("self") for frame in callers())
    return next((caller for caller in found if isinstance(caller, trainer)), None)


def _saved(callbacks: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of the schedule among those of all callbacks."""
    return callbacks.get(ScheduleCallback.__name__, {}).get("attributes", {}).get("resumed")
