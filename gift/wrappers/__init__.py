"""What extends the call of a module: bottleneck adapters, and prompts."""

from gift.wrappers.bottleneck import Bottleneck
from gift.wrappers.language import prompt_language_model, takes_token_ids
from gift.wrappers.prompt import Prompt
from gift.wrappers.prompted import VirtualTokens

__all__ = ["Bottleneck", "Prompt", "VirtualTokens", "prompt_language_model", "takes_token_ids"]
