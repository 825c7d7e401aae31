"""Prompt learning of PEFT: virtual tokens or a prefix of a causal language model.

PEFT also returns logits for the virtual tokens, and counts one more next token in a loss. The
logits of the given tokens are the same. Its files hold the virtual tokens themselves, without the
encoder that they may have been trained through.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.core.forwards import ForwardDelta, named_forward_deltas
from gift.errors import AdaptationError
from gift.factories import ma_prefix, ma_prompt, mc_path
from gift.interop.peft.forms import Config, Tensors
from gift.methods.settings import is_integer
from gift.strategies.base import FineTuningStrategy
from gift.support.tensors import cast_incompatibility
from gift.wrappers import Prefix, VirtualTokens, prefix_reader, takes_token_ids

PREFIX_TUNING, PROMPT_TUNING, P_TUNING = "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"
_KEY = "prompt_embeddings"
# Options that repeat what the model says.
_OF_MODEL = {
    "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads",
    "num_transformer_submodules",
}  # fmt: skip
PROMPT_OPTIONS: dict[str, frozenset[str]] = {
    PREFIX_TUNING: frozenset(
        {*_OF_MODEL, "encoder_hidden_size", "prefix_projection", "init_weights"}
    ),
    PROMPT_TUNING: frozenset({
        *_OF_MODEL, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs",
    }),
    P_TUNING: frozenset({
        *_OF_MODEL, "encoder_reparameterization_type", "encoder_hidden_size",
        "encoder_num_layers", "encoder_dropout",
    }),
}  # fmt: skip
"""The forms of prompt learning, with the options of start and encoder, which do not matter."""


def is_prompted(network: nn.Module) -> bool:
    """Whether virtual tokens or prefixes are the only wrapped forwards of a network."""
    found = list(named_forward_deltas(network))
    return bool(found) and all(w.method.name in ("prefix", "prompt") for *_, w in found)


def write_prompt(network: nn.Module, problems: list[str]) -> tuple[Config, Tensors]:
    """Write the virtual tokens or the prefix; nothing else may be trained."""
    problems += language_model_incompatibilities(network)
    found = list(_held(network))
    if len(found) != 1:
        problems.append("PEFT has a prompt for token ids only, not for embeddings")
        return {}, {}
    ((module, wrapper),) = found
    method: Any = wrapper.method
    tokens: Tensor = method.virtual_tokens(module, wrapper.tensors(module))
    config = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": len(tokens),
    }
    if isinstance(method, Prefix):
        layers, heads, head_dim = method.known_sizes
        config |= {"peft_type": PREFIX_TUNING, "num_layers": layers, "num_attention_heads": heads}
        config |= {"token_dim": heads * head_dim, "num_transformer_submodules": 1}
    else:
        config |= {"peft_type": PROMPT_TUNING, "token_dim": tokens.shape[1]}
        config |= {"prompt_tuning_init": "RANDOM"}
    return config, {_KEY: tokens}


def language_model_incompatibilities(network: nn.Module) -> Iterator[str]:
    """Yield why a network is not what PEFT takes for a causal language model."""
    name = plain_class(type(network)).__name__
    if not takes_token_ids(network) or not name.endswith(("ForCausalLM", "LMHeadModel")):
        yield f"{name} is not a causal language model of transformers: only there PEFT agrees"


def _held(network: nn.Module) -> Iterator[tuple[nn.Module, ForwardDelta]]:
    """Yield the module that holds virtual tokens or a prefix, and their record."""
    for _, module, wrapper in named_forward_deltas(network):
        if isinstance(wrapper.method, Prefix | VirtualTokens):
            yield module, wrapper


def prompt_incompatibilities(network: Any, config: Config, tensors: Tensors) -> Iterator[str]:
    """Yield why a prompt in a file cannot be used with that network."""
    if config.get("task_type") != "CAUSAL_LM":
        yield f"task_type is {config.get('task_type')!r}: prompts agree for 'CAUSAL_LM' only"
    yield from language_model_incompatibilities(network)
    unexpected = sorted(set(tensors) - {_KEY})
    if unexpected:
        yield f"{unexpected} are not what prompt tuning has"
    tokens, count = tensors.get(_KEY), config.get("num_virtual_tokens")
    if tokens is None:
        yield f"{_KEY} is missing"
    elif not (isinstance(count, int) and is_integer(count) and count > 0):
        yield f"num_virtual_tokens is {count!r}, expected an integer of at least 1"
    elif takes_token_ids(network):
        yield from _tensor_incompatibilities(network, config, tokens)


def _tensor_incompatibilities(network: Any, config: Config, tokens: Tensor) -> Iterator[str]:
    count, words = config["num_virtual_tokens"], network.get_input_embeddings().weight
    width = words.shape[1]
    if config["peft_type"] == PREFIX_TUNING:
        try:
            fitted = Prefix(count).fit(prefix_reader(network))
        except AdaptationError as error:
            yield str(error)
            return
        width = fitted.width
        heads = config.get("num_attention_heads")
        if heads is not None and heads != fitted.sizes.heads:
            yield f"num_attention_heads is {heads!r}, the model has {fitted.sizes.heads} for keys"
    if tuple(tokens.shape) != (count, width):
        yield f"{_KEY} is {tuple(tokens.shape)}, expected {(count, width)}"
    if problem := cast_incompatibility(tokens, words.dtype):
        yield f"{_KEY} {problem}"


def prompt_strategy(config: Config) -> FineTuningStrategy:
    """Return the strategy that puts as many virtual tokens, or keys and values, in front."""
    action = ma_prefix if config["peft_type"] == PREFIX_TUNING else ma_prompt
    return FineTuningStrategy([(mc_path(""), action(config["num_virtual_tokens"]))])


def put_prompt(network: nn.Module, tensors: Tensors) -> None:
    """Load the values of a file into the virtual tokens or the prefix."""
    ((module, wrapper),) = _held(network)
    with torch.no_grad():
        wrapper.tensors(module)["tokens"].copy_(tensors[_KEY])
