"""Prompt tuning of PEFT: virtual tokens before the input of a causal language model.

PEFT also returns logits for the virtual tokens, and counts one more next token in a loss. The
logits of the given tokens are the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.core.forwards import named_forward_deltas
from gift.factories import ma_prompt, mc_path
from gift.interop.peft.forms import Config, Tensors
from gift.methods.settings import is_integer
from gift.strategies.base import FineTuningStrategy
from gift.support.tensors import cast_incompatibility
from gift.wrappers.language import takes_token_ids
from gift.wrappers.prompted import VirtualTokens

PROMPT_TUNING = "PROMPT_TUNING"
_KEY = "prompt_embeddings"
# Options of the initialization, or options that repeat what the model says.
PROMPT_OPTIONS = frozenset({
    "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads",
    "num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs",
})  # fmt: skip


def is_prompted(network: nn.Module) -> bool:
    """Whether virtual tokens are the only wrapped forwards of a network."""
    found = list(named_forward_deltas(network))
    return bool(found) and all(wrapper.method.name == "prompt" for *_, wrapper in found)


def write_prompt(network: nn.Module, problems: list[str]) -> tuple[Config, Tensors]:
    """Write the virtual tokens; nothing else may be trained."""
    problems += _model_incompatibilities(network)
    tokens = _tokens(network)
    if tokens is None:
        problems.append("PEFT has a prompt for token ids only, not for embeddings")
        return {}, {}
    count, dim = tokens.shape
    config = {"num_virtual_tokens": count, "token_dim": dim, "prompt_tuning_init": "RANDOM"}
    common = {"peft_type": PROMPT_TUNING, "task_type": "CAUSAL_LM", "inference_mode": True}
    return common | config, {_KEY: tokens}


def _model_incompatibilities(network: nn.Module) -> Iterator[str]:
    name = plain_class(type(network)).__name__
    if not takes_token_ids(network) or not name.endswith(("ForCausalLM", "LMHeadModel")):
        yield f"{name} is not a causal language model of transformers: only there prompts agree"


def _tokens(network: nn.Module) -> Tensor | None:
    for _, module, wrapper in named_forward_deltas(network):
        if isinstance(wrapper.method, VirtualTokens):
            return wrapper.tensors(module)["tokens"]
    return None


def prompt_incompatibilities(network: Any, config: Config, tensors: Tensors) -> Iterator[str]:
    """Yield why a prompt in a file cannot be used with that network."""
    if config.get("task_type") != "CAUSAL_LM":
        yield f"task_type is {config.get('task_type')!r}: prompts agree for 'CAUSAL_LM' only"
    yield from _model_incompatibilities(network)
    unexpected = sorted(set(tensors) - {_KEY})
    if unexpected:
        yield f"{unexpected} are not what prompt tuning has"
    tokens, count = tensors.get(_KEY), config.get("num_virtual_tokens")
    if tokens is None:
        yield f"{_KEY} is missing"
    elif takes_token_ids(network):
        expected = (count, network.get_input_embeddings().weight.shape[1])
        if not is_integer(count) or tuple(tokens.shape) != expected:
            yield f"{_KEY} is {tuple(tokens.shape)}, expected {expected}"
        if problem := cast_incompatibility(tokens, network.get_input_embeddings().weight.dtype):
            yield f"{_KEY} {problem}"


def prompt_strategy(config: Config) -> FineTuningStrategy:
    """Return the strategy that prepends as many virtual tokens."""
    return FineTuningStrategy([(mc_path(""), ma_prompt(config["num_virtual_tokens"]))])


def put_prompt(network: nn.Module, tensors: Tensors) -> None:
    """Load the values of a file into the virtual tokens."""
    tokens = _tokens(network)
    assert tokens is not None
    with torch.no_grad():
        tokens.copy_(tensors[_KEY])
