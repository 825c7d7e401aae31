"""Freezing and unfreezing blocks by epochs, ranks by steps, in any training loop."""

from gift.schedules.base import Schedule
from gift.schedules.classic import Freeze, FreezeUnfreeze, NoFreeze, UnfreezeMilestones
from gift.schedules.config import load_schedule_from_config, register_schedule
from gift.schedules.ranks import RankAllocator
from gift.schedules.report import Row, ScheduleReport
from gift.schedules.triplets import orthogonality

__all__ = [
    "Freeze",
    "FreezeUnfreeze",
    "NoFreeze",
    "RankAllocator",
    "Row",
    "Schedule",
    "ScheduleReport",
    "UnfreezeMilestones",
    "load_schedule_from_config",
    "orthogonality",
    "register_schedule",
]
