"""Freezing and unfreezing blocks by epochs, in any training loop. It has no loop of its own."""

from gift.schedules.base import Schedule
from gift.schedules.classic import Freeze, FreezeUnfreeze, NoFreeze, UnfreezeMilestones
from gift.schedules.config import load_schedule_from_config, register_schedule
from gift.schedules.report import Row, ScheduleReport

__all__ = [
    "Freeze",
    "FreezeUnfreeze",
    "NoFreeze",
    "Row",
    "Schedule",
    "ScheduleReport",
    "UnfreezeMilestones",
    "load_schedule_from_config",
    "register_schedule",
]
