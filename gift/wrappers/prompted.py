"""The wrappers of a prompted language model's parts; see `gift.wrappers.language`."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.forwards import Forward, ForwardMethod, forward_deltas, where
from gift.errors import AdaptationError, GiftWarning
from gift.layers.table import family_of
from gift.methods.settings import flag, whole
from gift.wrappers.arguments import Arguments
from gift.wrappers.caches import is_tuples
from gift.wrappers.encoder import Encoded
from gift.wrappers.model_call import ModelCall, continuing
from gift.wrappers.prompt import in_front
from gift.wrappers.tensors import with_all_changed, with_items
from gift.wrappers.text_models import embedding_of, is_embedding, tokens_in, window_of


@dataclass(frozen=True)
class ModelPart(ForwardMethod):
    """Base class of the wrappers of a prompted language model's parts."""

    name: ClassVar[str] = "prompt"
    size_setting: ClassVar[str | None] = "num_virtual_tokens"

    num_virtual_tokens: int = whole(8)

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return no parameters: the embedding holds the virtual tokens."""
        return {}


@dataclass(frozen=True)
class VirtualTokens(Encoded, ModelPart):
    """Wraps the embedding: looks up the ids from -1 downwards among the virtual tokens."""

    def init_parameters(self, module: Any) -> dict[str, Tensor]:
        """Return the embeddings of random entries of the vocabulary, as in the paper.

        Vectors for an encoder are normal.
        """
        if self.encoder is not None:
            dim = module.embedding_dim
            return self.encoder_parameters(dim, dim, self.factory_kwargs(module.weight))
        n, entries = self.num_virtual_tokens, module.num_embeddings
        chances = torch.ones(entries)
        if module.padding_idx is not None and entries > 1:
            chances[module.padding_idx] = 0
        ids = torch.multinomial(chances, n, replacement=n >= entries)
        rows = module(ids.to(module.weight.device))
        return {"tokens": rows.detach().to(**self.factory_kwargs(module.weight), copy=True)}

    def reset(self, module: nn.Module) -> dict[str, Tensor]:
        """Return normal vectors with a standard deviation of 0.02, or of 1 for an encoder.

        The entries of the vocabulary may have no values yet.
        """
        made = self.init_parameters(module)
        if self.encoder is not None:
            return made
        return {"tokens": torch.randn_like(made["tokens"]) * 0.02}

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the embeddings of ids, virtual ones included."""
        ids, *rest = args or tuple(kwargs.values())
        if ids.numel() <= self.num_virtual_tokens:  # no virtual ones, as in a generation's steps
            return forward(ids, *rest)
        plain = forward(ids.clamp(min=0), *rest)
        tokens = self.virtual_tokens(module, parameters)
        virtual = F.embedding((-1 - ids).clamp(min=0), tokens).to(plain.dtype)
        return torch.where((ids < 0).unsqueeze(-1), virtual, plain)


@dataclass(frozen=True)
class PromptedReader(ModelPart):
    """Base class of the wrappers of the part that reads tokens and fills a cache."""

    first_position: int = whole(0, least=0, enters_weight=False, kw_only=True, found=True)
    positions: int | None = whole(None, enters_weight=False, kw_only=True, found=True)

    def fit(self, module: nn.Module) -> Self:
        """Return the method with the positions that the model supports."""
        first, number = _positions(module)
        if number is not None and self.num_virtual_tokens >= number:
            raise AdaptationError(
                f"{self.num_virtual_tokens} virtual tokens leave no room in {number} positions"
            )
        for wrapper in forward_deltas(module).values():
            if isinstance(wrapper.method, PromptedReader):
                raise AdaptationError(
                    f"it is already wrapped by {wrapper.method}, which also puts virtual tokens "
                    "into the cache"
                )
        return replace(self, first_position=first, positions=number)

    def read_call(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Arguments, ModelCall | None, Any]:
        """Return the arguments of a call, the call to extend, and its tokens.

        The last two are None if no tokens are given: the model's own error then names what it
        expects.

        Raises:
            AdaptationError: naming all arguments that cannot be combined with virtual tokens.
        """
        given = Arguments(module, args, kwargs, self.name)
        x = tokens_in(given.named)
        if x is None:
            return given, None, None
        call = ModelCall(
            given.named,
            x,
            virtual=self.num_virtual_tokens,
            first=self.first_position,
            limit=self.positions,
            keeps_states="cache_params" in module._gift_arguments,
        )
        self.refuse(module, call.problems)
        self._warn_of_window(module, call)
        return given, call, x

    def _warn_of_window(self, module: nn.Module, call: ModelCall) -> None:
        """Warn where padding before the text moves virtual tokens out of the sight of layers."""
        window, mask = window_of(module), call.named.get("attention_mask")
        if window is None or call.continues or torch.compiler.is_compiling():
            return
        if not isinstance(mask, Tensor) or call.time + self.num_virtual_tokens <= window:
            return
        if not bool(mask[:, 0].all()):
            warnings.warn(
                f"{where(module, self.name)} has layers in which a token sees the last {window} "
                "positions, and padding before the text, which stands between the virtual tokens "
                "and the text: results depend on how much there is. Pad on the right, or put texts "
                "of one length into a batch",
                GiftWarning,
                stacklevel=2,
            )

    def generating(
        self, module: nn.Module, named: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Raise if generation would continue with a cache."""
        self.refuse(module, continuing(self.num_virtual_tokens, named))
        return nullcontext()

    def refuse(self, module: nn.Module, problems: list[str]) -> None:
        """Raise one error that names all problems of a call, if there are any."""
        if problems:
            raise AdaptationError(f"{where(module, self.name)} {'; it '.join(problems)}")


@dataclass(frozen=True)
class PromptedModel(PromptedReader):
    """Wraps the model: prepends virtual tokens, and removes them from the output."""

    strip: bool = flag(True)

    def call(
        self,
        module: Any,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the model with virtual tokens before the given ones."""
        given, call, x = self.read_call(module, args, kwargs)
        if call is None:
            return given.passed_to(forward)
        call.extend()
        if not call.continues:
            self._put_in_front(module, given.named, x)
        output = given.passed_to(forward)
        call.note_caches(output)
        if call.continues or not self.strip:
            return output
        return self._stripped(module, output, *call.shape)

    def generating(
        self, module: nn.Module, named: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Raise if generation would continue with a cache."""
        if not self.strip:  # an encoder-decoder's cache holds no virtual tokens
            return nullcontext()
        return super().generating(module, named)

    def _put_in_front(self, module: Any, named: dict[str, Any], x: Tensor) -> None:
        n = self.num_virtual_tokens
        if x.is_floating_point():
            rows: Any = embedding_of(module)
            own = rows._gift_forwards[self.name]
            tokens = own.method.virtual_tokens(rows, own.tensors(rows))
            named["inputs_embeds"] = in_front(tokens, x, 1)
        else:
            ids = torch.arange(-1, -n - 1, -1, dtype=x.dtype, device=x.device)
            named["input_ids"] = torch.cat([ids.expand(len(x), n), x], 1)

    def _stripped(self, module: Any, output: Any, batch: int, time: int) -> Any:
        n, length = self.num_virtual_tokens, self.num_virtual_tokens + time

        def without(result: Tensor) -> Tensor:
            if result.ndim == 3 and result.shape[1] == length:
                return result[:, n:]
            if result.ndim == 2 and len(result) == batch * length:  # router scores of experts
                return result.unflatten(0, (batch, length))[:, n:].flatten(0, 1)
            return result

        stripped = with_all_changed(output, without, kept=is_tuples)
        pooler = getattr(module, "pooler", None)
        key = 1 if isinstance(stripped, tuple) else "pooler_output"
        there = len(stripped) > 1 if key == 1 else key in stripped
        if not there or not isinstance(pooler, nn.Module):
            return stripped
        # The pooler reads the first position, which held a virtual token: run it on the first
        # token.
        return with_items(stripped, {key: _pooled(module, pooler, stripped[0])})


def _pooled(module: Any, pooler: nn.Module, hidden: Tensor) -> Tensor:
    if family_of(pooler) != "linear":
        return pooler(hidden)
    activation = getattr(module, "pooler_activation", None) or module.activation
    return activation(pooler(hidden[:, 0]))


@dataclass(frozen=True)
class PromptedDecoder(ModelPart):
    """Wraps a decoder: extends the mask of the encoder's output for the virtual tokens in it."""

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the decoder's output."""
        given = Arguments(module, args, kwargs, self.name)
        mask, memory = map(given.named.get, ("encoder_attention_mask", "encoder_hidden_states"))
        n = self.num_virtual_tokens
        if mask is not None and memory is not None and mask.shape[-1] + n == memory.shape[1]:
            if mask.ndim != 2:
                raise AdaptationError(
                    f"{where(module, self.name)} was given an encoder_attention_mask that is not "
                    "(batch, time): gift does not know what it is for virtual tokens"
                )
            given.named["encoder_attention_mask"] = F.pad(mask, (n, 0), value=1)
        return given.passed_to(forward)


def _positions(module: Any) -> tuple[int, int | None]:
    """Return the first position, and the number of positions, or None if there is no limit."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet has -1
        return 0, None
    words = embedding_of(module)
    tables = [part for part in module.modules() if is_embedding(part)]
    padding = [table.padding_idx for table in tables
               if table.num_embeddings == limit and table is not words]  # fmt: skip
    # In RoBERTa and similar models, positions start after the padding index.
    first = next((index + 1 for index in padding if index is not None), 0)
    return first, limit - first
