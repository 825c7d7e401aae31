"""Prompt tuning of language models with the call interface of transformers.

A virtual token has an id like any other: the `k`-th is ``-k``. The embedding, which holds
``prompt_tokens``, looks the ids up there, and the model puts these ids before the others. So
everything that a model does with ids (positions that count them, embeddings that are scaled) is
right for virtual tokens as well. The wrapped module is the inner model, which has the embedding,
not the one with a head around it: heads, losses and ``generate()`` see only the tokens that they
passed.

* Masks, types and positions of tokens are extended, and the states of virtual tokens are removed
  from the model's output. Attention weights include them.
* A pooler that reads the first position (BERT) reads that of the first given token, so ``[CLS]``
  keeps its meaning. PEFT lets it read the first virtual token.
* A next-token loss counts the same tokens as before. PEFT counts one more, the first given token as
  predicted by the last virtual one.
* With a cache, the virtual tokens come with the first step only, when the cache is empty. The
  length of the cache must agree with the given mask and positions, and a cache that holds tokens
  must have been filled by this model; see `gift.wrappers.model_call`. Three cases are errors: a
  cache from an earlier ``generate()`` that another one should continue, a cache of fixed length,
  and an unknown argument that may hold states of earlier tokens.
* With padding on the left, the virtual tokens come before it, as in PEFT.
* In an encoder-decoder model, the encoder gets the virtual tokens, as in the paper, and the decoder
  attends to their states, which stay in the encoder's output.
"""

from typing import Any

from torch import nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.forwards import ForwardMethod, wrap_forward
from gift.errors import AdaptationError
from gift.wrappers.prefix import Prefix
from gift.wrappers.prompted import PromptedDecoder, PromptedModel, VirtualTokens
from gift.wrappers.text_models import embedding_of, reads_two_texts, takes, takes_token_ids


def prompt_language_model(model: Any, method: VirtualTokens, path: str = "") -> None:
    """Prepend virtual tokens to the input of a language model, or of its encoder if it has one.

    Args:
        model: a model for which `takes_token_ids` is True, with or without a head.
        method: the number of virtual tokens and their dtype.
        path: path of the model in its network, for messages.

    Raises:
        AdaptationError: if that is not possible. Parts of the model may be wrapped by then.
    """
    encoder, decoder = _two_parts(model)
    reader, embedding = _reader_in(encoder if decoder is not None else model)
    n = method.num_virtual_tokens
    paths = {id(part): name for name, part in model.named_modules()}
    strips = PromptedModel(num_virtual_tokens=n, strip=decoder is None)
    parts: list[tuple[nn.Module, ForwardMethod]] = [(embedding, method), (reader, strips)]
    if decoder is not None:
        if not takes(decoder, "encoder_attention_mask"):
            name = plain_class(type(decoder)).__name__
            raise AdaptationError(
                f"its decoder, a {name}, takes no encoder_attention_mask, which must cover the "
                "virtual tokens"
            )
        parts.append((decoder, PromptedDecoder(num_virtual_tokens=n)))
    for part, own in parts:
        wrap_forward(part, own, joined(path, paths.get(id(part), "")))


def prefix_language_model(model: Any, method: Prefix, path: str = "") -> None:
    """Put trained keys and values before those of a language model, or of its decoder.

    Args:
        model: a model for which `takes_token_ids` is True, with or without a head.
        method: the number of virtual tokens, and how their keys and values are trained.
        path: path of the model in its network, for messages.

    Raises:
        AdaptationError: if that is not possible.
    """
    reader = prefix_reader(model)
    paths = {id(part): name for name, part in model.named_modules()}
    wrap_forward(reader, method, joined(path, paths.get(id(reader), "")))


def prefix_reader(model: Any) -> Any:
    """Return the part of a language model that reads tokens and fills the cache.

    Raises:
        AdaptationError: if it has none.
    """
    _, decoder = _two_parts(model)
    reader, _ = _reader_in(model if decoder is None else decoder)
    return reader


def _reader_in(model: Any) -> tuple[Any, Any]:
    """Return the inner model, without heads, that embeds token ids, and its embedding."""
    embedding = embedding_of(model)
    inner = [part for part in model.modules() if takes_token_ids(part)
             and embedding_of(part) is embedding]  # fmt: skip
    if embedding is None or not inner:
        raise AdaptationError("no part of it embeds token ids")
    return inner[-1], embedding


def _two_parts(model: Any) -> tuple[Any, Any]:
    """Return encoder and decoder, or None for both."""
    if not reads_two_texts(model):
        return None, None
    parts = [getattr(model, name)() for name in ("get_encoder", "get_decoder")]
    if model in parts or parts[0] is parts[1] or not all(isinstance(p, nn.Module) for p in parts):
        return None, None
    return parts[0], parts[1]
