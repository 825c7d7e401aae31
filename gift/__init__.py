"""gift fine-tunes any ``torch.nn.Module`` by training a small delta beside its frozen weights."""

from typing import Any

from gift.bank import DeltaBank, extract
from gift.budget import suggest
from gift.core.iterator import ModuleIterator
from gift.core.merging import merge, merged
from gift.core.reference import reference
from gift.core.undo.unload import disabled
from gift.engine.enable import disable_fine_tuning, enable_fine_tuning, plan_fine_tuning
from gift.errors import AdaptationError, GiftError, GiftWarning
from gift.files import DeltaFile, DeltaFileError, inspect, load, save
from gift.interop import (
    load_diffusers,
    load_kohya,
    load_peft,
    save_diffusers,
    save_kohya,
    save_peft,
)  # fmt: skip
from gift.starts import initialise
from gift.strategies import FineTuningStrategy, load_strategy_from_config, merge_strategies
from gift.version import __version__ as __version__

_LATER = ("compare", "search")  # of `gift.many`, which needs the extra `cli`


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gift import many

    return getattr(many, name)


__all__ = [
    "AdaptationError",
    "DeltaBank",
    "DeltaFile",
    "DeltaFileError",
    "FineTuningStrategy",
    "GiftError",
    "GiftWarning",
    "ModuleIterator",
    "disable_fine_tuning",
    "disabled",
    "enable_fine_tuning",
    "extract",
    "initialise",
    "inspect",
    "load",
    "load_diffusers",
    "load_kohya",
    "load_peft",
    "load_strategy_from_config",
    "merge",
    "merge_strategies",
    "merged",
    "plan_fine_tuning",
    "reference",
    "save",
    "save_diffusers",
    "save_kohya",
    "save_peft",
    "suggest",
]
