"""Methods that wrap a module's forward pass, one file each: bottleneck adapters, prompts, prefixes.

They do not change effective weights.
"""

from gift.wrappers.bottleneck import Bottleneck
from gift.wrappers.language import (
    prefix_language_model,
    prefix_reader,
    prompt_language_model,
    takes_token_ids,
)
from gift.wrappers.prefix import Prefix
from gift.wrappers.prompt import Prompt
from gift.wrappers.prompted import VirtualTokens

__all__ = [
    "Bottleneck",
    "Prefix",
    "Prompt",
    "VirtualTokens",
    "prefix_language_model",
    "prefix_reader",
    "prompt_language_model",
    "takes_token_ids",
]
