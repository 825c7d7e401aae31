"""The sizes of the keys and values that a language model of transformers keeps in its cache."""

from typing import Any, NamedTuple

from torch import nn

from gift.wrappers.text_models import is_causal, is_encoder

_WITH_KEYS = {"full_attention", "sliding_attention", "chunked_attention"}
# Options of models whose layers do not all have keys and values of one shape.
_UNEQUAL = ("kv_lora_rank", "num_kv_shared_layers", "global_head_dim", "swa_head_dim")


class KeySizes(NamedTuple):
    """The keys of a model, and its values, which have the same shape.

    Args:
        layers: number of layers.
        heads: number of heads of keys in a layer.
        head_dim: number of features of a key.
    """

    layers: int | None
    heads: int | None
    head_dim: int | None


def key_sizes(module: Any, given: KeySizes) -> tuple[KeySizes, list[str]]:
    """Return the sizes of a model's keys, and why they are not known.

    Args:
        module: the part of a model that reads text.
        given: sizes that are known better; None for those to be read from the configuration.
    """
    config = getattr(module, "config", None)
    found = KeySizes(_layers(config), _heads(config), _head_dim(config))
    values = [own if own is not None else read for own, read in zip(given, found, strict=True)]
    sizes = KeySizes(*values)
    problems = [f"its configuration does not say its number of {name}: give {name}="
                for name, value in sizes._asdict().items() if value is None]  # fmt: skip
    problems += _contradicted(module, given, found) or _unlike(module, config, sizes.layers)
    return sizes, problems


def _contradicted(module: nn.Module, given: KeySizes, found: KeySizes) -> list[str]:
    """Return what was given that is not so, by the configuration and by the layers of keys."""
    both = zip(KeySizes._fields, given, found, strict=True)
    wrong = [(name, own, read) for name, own, read in both
             if own is not None and read is not None and own != read]  # fmt: skip
    widths = _key_widths(module)
    heads, size = given.heads or found.heads, given.head_dim or found.head_dim
    is_right = _width(heads, size) in widths and _width(found.heads, found.head_dim) not in widths
    if is_right and given.layers in (None, found.layers):
        return []  # the configuration is what is wrong
    return [f"{name} is {own}, its configuration says {read}: leave {name}= out"
            for name, own, read in wrong]  # fmt: skip


def _width(heads: int | None, head_dim: int | None) -> int | None:
    return None if heads is None or head_dim is None else heads * head_dim


def _key_widths(module: nn.Module) -> set[int]:
    """Return the numbers of features of all keys, from layers with the usual name."""
    layers = [getattr(p, "k_proj", None) for p in module.modules() if is_causal(p)]
    widths = (getattr(layer, "out_features", None) for layer in layers)
    return {width for width in widths if isinstance(width, int)}


def _unlike(module: nn.Module, config: Any, layers: int | None) -> list[str]:
    """Return why the layers do not all have keys of one shape."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - _WITH_KEYS):
        return [f"it has layers without keys and values: {others}"]
    if unequal := [name for name in _UNEQUAL if getattr(config, name, None)]:
        return [f"the keys and values of its layers are not of one shape ({', '.join(unequal)})"]
    if len(widths := _key_widths(module)) > 1:
        return [f"the keys of its layers are not of one shape: they have {sorted(widths)} features"]
    if is_encoder(module):
        return ["its attention is not causal: an encoder has no cache of keys and values"]
    causal = {getattr(p, "layer_idx", None) for p in module.modules() if is_causal(p)} - {None}
    if causal and layers is not None and causal != set(range(layers)):
        return [f"{len(causal)} of its {layers} layers have keys and values"]
    return []


def _layers(config: Any) -> int | None:
    return _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")


def _heads(config: Any) -> int | None:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1  # Falcon, GPT BigCode
    if getattr(config, "new_decoder_architecture", False):
        return _first(config, "num_kv_heads")
    return _first(config, "num_key_value_heads", "decoder_attention_heads", "num_attention_heads")


def _head_dim(config: Any) -> int | None:
    found = _first(config, "head_dim", "d_kv")
    if found is not None:
        return found
    width = _first(config, "hidden_size", "d_model")
    heads = _first(config, "decoder_attention_heads", "num_attention_heads")
    return None if width is None or heads is None else width // heads


def _first(config: Any, *names: str) -> int | None:
    """Return the first of these options that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
