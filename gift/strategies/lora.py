"""LoRA on all layers, on linear layers, or on convolutions."""

from gift.strategies.adapting import STRATEGIES

LoRAAllFineTuningStrategy = STRATEGIES["LoRAAllFineTuningStrategy"]
LoRALinearFineTuningStrategy = STRATEGIES["LoRALinearFineTuningStrategy"]
LoRAConvFineTuningStrategy = STRATEGIES["LoRAConvFineTuningStrategy"]
