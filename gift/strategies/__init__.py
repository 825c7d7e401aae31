"""Strategies: which parts of a network are fine-tuned, and how."""

from gift.strategies.base import (
    Cap,
    FineTuningStrategy,
    load_strategy_from_config,
    register_strategy,
)
from gift.strategies.classic import (
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
)
from gift.strategies.combine import DebugStrategy, MergedStrategy, merge_strategies
from gift.strategies.lora import (
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)

__all__ = [
    "Cap",
    "DebugStrategy",
    "FineTuningStrategy",
    "FreezeStrategy",
    "FullFineTuningStrategy",
    "HeadReplacementStrategy",
    "LoRAAllFineTuningStrategy",
    "LoRAConvFineTuningStrategy",
    "LoRALinearFineTuningStrategy",
    "MergedStrategy",
    "load_strategy_from_config",
    "merge_strategies",
    "register_strategy",
]
