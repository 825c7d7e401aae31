"""Methods that wrap a module's forward pass, one file each: bottleneck adapters, prompts.

They do not change effective weights.
"""

from gift.wrappers.bottleneck import Bottleneck
from gift.wrappers.language import prompt_language_model, takes_token_ids
from gift.wrappers.prompt import Prompt
from gift.wrappers.prompted import VirtualTokens

__all__ = ["Bottleneck", "Prompt", "VirtualTokens", "prompt_language_model", "takes_token_ids"]
