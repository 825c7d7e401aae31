"""Methods that wrap a module's forward pass, one file each: bottlenecks, LoReFT, prompts, aLoRA.

They do not change effective weights.
"""

from gift.wrappers.activated import ActivatedLoRA, Invocation, is_invocation
from gift.wrappers.bottleneck import Bottleneck
from gift.wrappers.language import (
    prefix_language_model,
    prefix_reader,
    prompt_language_model,
)
from gift.wrappers.loreft import LoReFT, intervene, labelled
from gift.wrappers.positions import recomputable
from gift.wrappers.prefix import Prefix
from gift.wrappers.prompt import Prompt
from gift.wrappers.prompted import VirtualTokens
from gift.wrappers.text_models import reads_two_texts, takes_token_ids
from gift.wrappers.visual import VisualPrompt, prompt_blocks

__all__ = [
    "ActivatedLoRA",
    "Bottleneck",
    "Invocation",
    "LoReFT",
    "Prefix",
    "Prompt",
    "VirtualTokens",
    "VisualPrompt",
    "intervene",
    "is_invocation",
    "labelled",
    "prefix_language_model",
    "prefix_reader",
    "prompt_blocks",
    "prompt_language_model",
    "reads_two_texts",
    "recomputable",
    "takes_token_ids",
]
