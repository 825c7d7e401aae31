"""What extends the call of a module: bottleneck adapters, and prompts."""

from gift.calls.bottleneck import Bottleneck
from gift.calls.language import prompt_language_model, takes_token_ids
from gift.calls.prompt import Prompt
from gift.calls.prompted import VirtualTokens

__all__ = ["Bottleneck", "Prompt", "VirtualTokens", "prompt_language_model", "takes_token_ids"]
