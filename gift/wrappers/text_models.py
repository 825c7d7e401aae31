"""What a language model in the style of transformers shows of itself, and of a call."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gift.layers.table import family_of


def embedding_of(module: Any) -> Any:
    """Return the token embedding of a model in the style of transformers, or None."""
    if not hasattr(module, "get_input_embeddings"):
        return None
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = getattr(module, "embed_tokens", None)  # encoders of old versions have only this
    return found if is_embedding(found) else None


def is_embedding(module: Any) -> bool:
    """Whether a module is an embedding layer."""
    return isinstance(module, nn.Module) and family_of(module) == "embedding"


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has a parameter of that name."""
    return argument in inspect.signature(module.forward).parameters


def takes_token_ids(module: Any) -> bool:
    """Whether a module is a model that embeds token ids, as those of transformers do."""
    return embedding_of(module) is not None and takes(module, "input_ids")


def tokens_in(named: Mapping[str, Any]) -> Tensor | None:
    """Return the token ids among the arguments of a call, or the embeddings in their place."""
    x = named.get("input_ids")
    x = named.get("inputs_embeds") if x is None else x
    return x if isinstance(x, Tensor) else None


def is_causal(part: nn.Module) -> Any:
    """Return what an attention layer says of itself; None if it says nothing."""
    return getattr(part, "is_causal", None)


def is_encoder(module: nn.Module) -> bool:
    """Whether a model is known to have no causal attention."""
    said = {value for p in module.modules() if isinstance(value := is_causal(p), bool)}
    return said == {False}


def window_of(model: Any) -> int | None:
    """Return how many positions a token sees in layers that see fewer than all; None if all do."""
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    names = [name for kind, name in sizes.items() if kinds is None or kind in kinds]
    found = (getattr(config, name, None) for name in names)
    return min((size for size in found if isinstance(size, int)), default=None)


def reads_two_texts(model: Any) -> bool:
    """Whether a model is an encoder and a decoder, by its configuration."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def prompt_of(named: Mapping[str, Any]) -> Tensor | None:
    """Return the token ids ``(batch, time)`` that ``generate()`` is given, or None."""
    given = (named.get(name) for name in ("input_ids", "inputs"))
    return next((ids for ids in given if isinstance(ids, Tensor) and ids.ndim == 2), None)
