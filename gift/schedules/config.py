"""Schedules as plain data, which files can hold."""

from collections.abc import Mapping
from typing import Any

from gift.schedules.base import Schedule
from gift.support.recipes import decode, register, registered


def register_schedule(cls: type[Schedule]) -> type[Schedule]:
    """Class decorator: lets files name this schedule."""
    return register(cls)


def load_schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule that plain data describes: its name, and the arguments of its construction.

    Args:
        config: ``{"name": ..., "init_paras": {...}}``, as from `Schedule.to_config`.

    Raises:
        ValueError: for unknown names, listing all, or arguments that do not fit.

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
