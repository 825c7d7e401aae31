"""Prefix tuning: trained keys and values in front of those of each attention layer."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gift.core.forwards import Forward, argument_names, where
from gift.errors import AdaptationError
from gift.kernels.torch_state import autocasts
from gift.methods.settings import whole
from gift.private.transformers import checkpointing_parts
from gift.support.optional import require
from gift.wrappers.caches import version
from gift.wrappers.encoder import Encoded
from gift.wrappers.key_sizes import KeySizes, key_sizes
from gift.wrappers.prompted import PromptedReader
from gift.wrappers.text_models import embedding_of

_CACHES = ("cache", "past_key_values")  # names of the argument in new and old transformers


@dataclass(frozen=True)
class Prefix(Encoded, PromptedReader):
    """Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190) of a language model.

    In each layer, the keys and values of `n` virtual tokens come before those of the text, and
    every token attends to them::

        softmax(q [P_K; K]^T / sqrt(head_dim)) [P_V; V]

    They are put into the model's cache before the first token, so the positions of the text start
    at `n`. Outputs, losses and ``generate()`` see the given tokens only. In an encoder-decoder
    model, they are those of the decoder's attention to itself. Models without a cache of keys and
    values, as BERT and state-space models, are refused; so is gradient checkpointing, which leaves
    caches out.

    All of them are one tensor ``tokens (n, 2 layers heads head_dim)``: for each layer its keys,
    then its values. With ``encoder="mlp"``, they are ``W_1 tanh(W_0 E + b_0) + b_1`` of trained
    vectors ``E (n, dim)``, as in the paper, where `dim` is that of the model's embeddings. With a
    hidden size of `h` and `d` numbers for a token, these are ``n dim + dim h + h + h d + d``
    parameters. They start as normal numbers with a standard deviation of 0.02 or, with an encoder,
    `E` with one of 1.

    A prefix, as a prompt, changes the outputs at the start.

    Args:
        num_virtual_tokens: `n`.
        layers: number of layers; None infers it, as the next two, from the model's configuration.
        heads: number of heads of keys and values in a layer.
        head_dim: number of features of a key and of a value.
        encoder: ``"mlp"`` to train the prefix through an encoder, or None.
        encoder_size: the hidden size `h` of the encoder; None means `dim`.
        dtype: dtype of the new parameters, or its name; None means that of the module, but at least
            float32.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
    """

    name: ClassVar[str] = "prefix"
    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(torch.tanh)

    layers: int | None = whole(None, enters_weight=False, kw_only=True, found=True)
    heads: int | None = whole(None, enters_weight=False, kw_only=True, found=True)
    head_dim: int | None = whole(None, enters_weight=False, kw_only=True, found=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder == "lstm":
            raise ValueError("Prefix: encoder is 'lstm', expected 'mlp' or None")

    def fit(self, module: Any) -> Self:
        """Return the method with the sizes of the model's cache."""
        name = _cache_name(module)
        if name is None:
            raise AdaptationError(
                "it takes no cache, into which the keys and values of a prefix are put: use "
                "virtual tokens (PromptFineTuningStrategy)"
            )
        if not _takes_object(module, name):
            raise AdaptationError(
                f"its {name} are tuples, not a cache object, in {version()}: use a newer version, "
                "or virtual tokens (PromptFineTuningStrategy)"
            )
        sizes, problems = key_sizes(module, self.sizes)
        if problems:
            raise AdaptationError("; ".join(problems))
        return replace(super().fit(module), **sizes._asdict())

    def init_parameters(self, module: Any) -> dict[str, Tensor]:
        """Return normal numbers: with a standard deviation of 0.02, or of 1 for an encoder."""
        words = embedding_of(module)
        like = self.factory_kwargs(words.weight)
        if self.encoder is not None:
            return self.encoder_parameters(words.embedding_dim, self.width, like)
        return {"tokens": torch.randn(self.num_virtual_tokens, self.width, **like) * 0.02}

    @property
    def sizes(self) -> KeySizes:
        """The sizes of keys and values; None for those that are not inferred yet."""
        return KeySizes(self.layers, self.heads, self.head_dim)

    @property
    def width(self) -> int:
        """Number of values of a virtual token in all layers."""
        layers, heads, head_dim = self.known_sizes
        return 2 * layers * heads * head_dim

    @property
    def known_sizes(self) -> tuple[int, int, int]:
        """The same after `fit`, or if all of them were given."""
        assert self.layers is not None
        assert self.heads is not None
        assert self.head_dim is not None
        return self.layers, self.heads, self.head_dim

    def _widths(self, dim: int, size: int, outputs: int) -> list[int]:
        return [dim, size, outputs]

    def call(
        self,
        module: Any,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the model with the prefix in its cache."""
        if checkpointing_parts(module):
            # A block that is called again would write its keys into the cache a second time.
            raise AdaptationError(
                f"{where(module, self.name)} uses gradient checkpointing, for which transformers "
                "takes the cache away from its blocks, and the prefix with it: call "
                "gradient_checkpointing_disable(), or checkpoint the model as a whole"
            )
        given, call, x = self.read_call(module, args, kwargs)
        if call is None:
            return given.passed_to(forward)
        call.extend(in_cache=True)
        cache = call.cache
        if not call.continues:
            if cache is None:
                cache = given.named[_cache_name(module) or ""] = _new_cache(module.config)
            tokens = self.virtual_tokens(module, parameters).to(_dtype(module, x))
            for layer, pair in enumerate(self.keys_and_values(tokens)):
                _keys_in(cache).update(*(part.expand(len(x), -1, -1, -1) for part in pair), layer)
        output = given.passed_to(forward)
        if not call.continues:
            self._check(module, _keys_in(cache), call.time)
        call.note_caches(output)
        if call.cache is None and not _keeps_cache(module, given.named.get("use_cache")):
            return _without(output, cache)
        return output

    def keys_and_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of each layer, both ``(1, heads, n, head_dim)``.

        Args:
            tokens: the virtual tokens ``(n, 2 layers heads head_dim)``.
        """
        layers, heads, head_dim = self.known_sizes
        parts = tokens.view(len(tokens), layers, 2, 1, heads, head_dim).permute(1, 2, 3, 4, 0, 5)
        return [(both[0], both[1]) for both in parts]

    def _check(self, module: nn.Module, cache: Any, time: int) -> None:
        """Raise if a layer did not read the prefix."""
        if torch.compiler.is_compiling():
            return
        expected = self.num_virtual_tokens + time
        wrong = [i for i in range(self.known_sizes[0]) if int(cache.get_seq_length(i)) != expected]
        if wrong:
            raise AdaptationError(
                f"{where(module, self.name)} does not use the cache in its layers {wrong}: a "
                "prefix has no effect there"
            )


def _cache_name(module: nn.Module) -> str | None:
    """Return the name of the argument that is a cache of keys and values."""
    names = argument_names(type(module))
    return next((name for name in _CACHES if name in names), None)


def _takes_object(module: nn.Module, name: str) -> bool:
    """Whether that argument is a cache object, as far as its annotation says."""
    annotation = inspect.signature(type(module).forward).parameters[name].annotation
    return annotation is inspect.Parameter.empty or "Cache" in str(annotation)


def _new_cache(config: Any) -> Any:
    """Return an empty cache of the type that a model makes itself."""
    transformers = require("transformers", "text")
    cache = transformers.DynamicCache()
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        return transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    return cache


def _keys_in(cache: Any) -> Any:
    """Return the cache of the attention of tokens to each other."""
    return getattr(cache, "self_attention_cache", cache)


def _keeps_cache(module: Any, use_cache: bool | None) -> bool:
    """Whether the plain model would give a cache back."""
    return bool(getattr(module.config, "use_cache", False) if use_cache is None else use_cache)


def _without(output: Any, cache: Any) -> Any:
    """Return a model's output without the cache."""
    if isinstance(output, tuple):
        return tuple(item for item in output if item is not cache)
    return type(output)(**{key: item for key, item in output.items() if item is not cache})


def _dtype(module: Any, x: Tensor) -> torch.dtype:
    """Return the dtype in which the model computes keys; `x` are token ids or embeddings."""
    if autocasts(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    dtype: torch.dtype = (x if x.is_floating_point() else embedding_of(module).weight).dtype
    return dtype
