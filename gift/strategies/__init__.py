"""Caps and strategies: which parts of a network are fine-tuned, and how.

They change nothing themselves.
"""

from gift.strategies.adapting import STRATEGIES, lookup_for
from gift.strategies.base import (
    Cap,
    FineTuningStrategy,
    load_strategy_from_config,
    register_strategy,
)
from gift.strategies.classic import (
    DetectionHeadStrategy,
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    SegmentationHeadStrategy,
)
from gift.strategies.combine import DebugStrategy, MergedStrategy, merge_strategies
from gift.strategies.of_methods import *  # noqa: F403 - its stub has the names
from gift.strategies.parts import (
    BitFitFineTuningStrategy,
    ModulesFineTuningStrategy,
    NormFineTuningStrategy,
)
from gift.strategies.recommended import RecommendedFineTuningStrategy
from gift.strategies.resolved import ResolvedStrategy
from gift.strategies.sized import SizedStrategy
from gift.strategies.wrapping import (
    ActivatedLoRAFineTuningStrategy,
    BottleneckFineTuningStrategy,
    LoReFTFineTuningStrategy,
    PrefixFineTuningStrategy,
    PromptFineTuningStrategy,
    PTuningFineTuningStrategy,
    VisualPromptFineTuningStrategy,
)

__all__ = [
    *STRATEGIES,
    "STRATEGIES",
    "ActivatedLoRAFineTuningStrategy",
    "BitFitFineTuningStrategy",
    "BottleneckFineTuningStrategy",
    "Cap",
    "DebugStrategy",
    "DetectionHeadStrategy",
    "FineTuningStrategy",
    "FreezeStrategy",
    "FullFineTuningStrategy",
    "HeadReplacementStrategy",
    "LoReFTFineTuningStrategy",
    "MergedStrategy",
    "ModulesFineTuningStrategy",
    "NormFineTuningStrategy",
    "PTuningFineTuningStrategy",
    "PrefixFineTuningStrategy",
    "PromptFineTuningStrategy",
    "RecommendedFineTuningStrategy",
    "ResolvedStrategy",
    "SegmentationHeadStrategy",
    "SizedStrategy",
    "VisualPromptFineTuningStrategy",
    "load_strategy_from_config",
    "merge_strategies",
    "register_strategy",
]


__getattr__ = lookup_for(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *STRATEGIES})
