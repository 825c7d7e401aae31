"""Schedules in the transformers Trainer."""

import functools
import json
from pathlib import Path
from typing import Any

from gift.private.torch.calls import callers
from gift.schedules.base import Schedule
from gift.schedules.config import load_schedule_from_config
from gift.support.optional import require

_callbacks: Any = require("transformers.trainer_callback", "text")

_KEY = "gift_schedule"  # key in optimizer states; optimizers ignore unknown keys


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
        if (trainer := _trainer()) is None:
            return
        create = trainer.create_optimizer

        @functools.wraps(create)
        def create_optimizer(*arguments: Any, **named: Any) -> Any:
            optimizer = create(*arguments, **named)
            for handle in self._handles:
                handle.remove()
            before = functools.partial(self._before_state, trainer)
            self._handles = [
                optimizer.register_state_dict_post_hook(self._with_state),
                optimizer.register_load_state_dict_pre_hook(before),
            ]
            return optimizer

        trainer.create_optimizer = create_optimizer

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


def _trainer() -> Any:
    """Return the Trainer that is being constructed: callbacks are not told which one owns them."""
    trainer = require("transformers", "text").Trainer
    found = (frame.f_locals.get("self") for frame in callers())
    return next((caller for caller in found if isinstance(caller, trainer)), None)


def _saved(callbacks: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of the schedule among those of all callbacks."""
    return callbacks.get(ScheduleCallback.__name__, {}).get("attributes", {}).get("resumed")
