"""Schedules as plain data, for config files."""

from collections.abc import Mapping
from typing import Any

from gift.schedules.base import Schedule
from gift.support.recipes import decode, register, registered


def register_schedule(cls: type[Schedule]) -> type[Schedule]:
    """Class decorator that lets config files name this schedule."""
    return register(cls)


def load_schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Create a schedule from plain data: its name and its constructor arguments.

    Args:
        config: ``{"name": ..., "init_paras": {...}}``, as from `Schedule.to_config`.

    Raises:
        ValueError: for unknown names, listing all known ones, or for arguments that do not fit.

    Example:
        >>> from gift.schedules import load_schedule_from_config
        >>> config = {"name": "FreezeUnfreeze", "init_paras": {"unfreeze_epoch": 2}}
        >>> load_schedule_from_config(config)
        FreezeUnfreeze(unfreeze_epoch=2)
    """
    if not isinstance(config, Mapping) or set(config) != {"name", "init_paras"}:
        found = sorted(map(str, config)) if isinstance(config, Mapping) else repr(config)
        raise ValueError(f"expected a mapping with 'name' and 'init_paras', found {found}")
    known = registered(Schedule)
    if config["name"] not in known:
        raise ValueError(f"unknown schedule {config['name']!r}; known: {[*known]}")
    return decode(dict(config))
