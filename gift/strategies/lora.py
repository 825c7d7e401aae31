"""LoRA on all layers, on linear layers, or on convolutions."""

from gift.strategies.of_methods import (
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)

__all__ = [
    "LoRAAllFineTuningStrategy",
    "LoRAConvFineTuningStrategy",
    "LoRALinearFineTuningStrategy",
]
