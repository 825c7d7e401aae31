"""Freezing and unfreezing the blocks of a network by epochs, in any training loop."""

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
