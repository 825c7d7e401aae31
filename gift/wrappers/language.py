"""Prompt tuning of language models that are called as those of transformers are.

A virtual token has an id like any other: the `k`-th is ``-k``. The embedding looks it up among
``prompt_tokens``, which stand on it, and the model puts these ids before the others. So all that a
model does with ids (positions that count them, embeddings that are scaled) is right for virtual
tokens as well. It is the inner model, which has the embedding, that is extended, not the one with a
head around it: heads, losses and ``generate()`` see the tokens that they gave, and nothing else.

* Masks, types and positions of tokens are extended, the states of virtual tokens are taken out of
  what the model gives; weights of attention are shown with them.
* A pooler that reads the first position (BERT) reads that of the first given token, so ``[CLS]``
  keeps its meaning. PEFT lets it read the first virtual token.
* A loss over next tokens counts those that it counted before. PEFT counts one more, the first
  given token as predicted by the last virtual one.
* With a cache, the virtual tokens come with the first step only: where the cache is empty. What
  it holds must agree with the mask and the positions that are given, and a cache that holds
  tokens must have been filled by this model; see `gift.wrappers.understood`. A cache from an
  earlier ``generate()`` cannot be continued by another, one of fixed length cannot be used, and an
  argument that is not known may hold states of earlier tokens: all three are errors.
* Where padding stands on the left, the virtual tokens stand before it, as in PEFT.
* Of an encoder and a decoder, the encoder gets the virtual tokens, as in the paper, and the decoder
  attends to their states: these are left in what the encoder gives.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.forwards import ForwardMethod, wrap_forward
from gift.errors import AdaptationError
from gift.wrappers.prompted import PromptedMemory, PromptedModel, VirtualTokens, embedding_of


def takes_token_ids(module: Any) -> bool:
    """Whether it is a model that embeds token ids, as those of transformers do."""
    return embedding_of(module) is not None and "input_ids" in _arguments(module)


def _arguments(module: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(module.forward).parameters


def prompt_language_model(model: Any, method: VirtualTokens, path: str = "") -> None:
    """Put virtual tokens in front of what a language model reads; of two parts, the encoder.

    Args:
        model: one that `takes_token_ids`, with a head or without.
        method: the number of virtual tokens and their dtype.
        path: where the model stands in its network, for messages.

    Raises:
        AdaptationError: if that is not possible; parts of it may be extended then.
    """
    encoder, decoder = _two_parts(model)
    reader = encoder if decoder is not None else model
    embedding = embedding_of(reader)
    inner = [part for part in reader.modules() if takes_token_ids(part)
             and embedding_of(part) is embedding]  # fmt: skip
    if embedding is None or not inner:
        raise AdaptationError("its encoder embeds no token ids")
    reader, n = inner[-1], method.num_virtual_tokens
    paths = {id(part): name for name, part in model.named_modules()}
    strips = PromptedModel(num_virtual_tokens=n, strip=decoder is None)
    parts: list[tuple[nn.Module, ForwardMethod]] = [(embedding, method), (reader, strips)]
    if decoder is not None:
        if "encoder_attention_mask" not in _arguments(decoder):
            name = plain_class(type(decoder)).__name__
            raise AdaptationError(
                f"its decoder, a {name}, takes no encoder_attention_mask, which would have to tell "
                "it of the virtual tokens"
            )
        parts.append((decoder, PromptedMemory(num_virtual_tokens=n)))
    for part, own in parts:
        wrap_forward(part, own, joined(path, paths.get(id(part), "")))


def _two_parts(model: Any) -> tuple[Any, Any]:
    """Encoder and decoder, or None for both."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None, None
    parts = [getattr(model, name)() for name in ("get_encoder", "get_decoder")]
    if model in parts or parts[0] is parts[1] or not all(isinstance(p, nn.Module) for p in parts):
        return None, None
    return parts[0], parts[1]
