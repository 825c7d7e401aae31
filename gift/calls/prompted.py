"""What the parts of a prompted language model do; see `gift.calls.language`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.calls.arguments import Arguments
from gift.calls.prompt import in_front
from gift.calls.tensors import with_all_changed, with_items
from gift.extension import CallMethod, Forward, where
from gift.methods import AdaptationError
from gift.methods.settings import flag, whole


@dataclass(frozen=True)
class OfModel(CallMethod):
    """What the parts of a prompted language model have in common."""

    name: ClassVar[str] = "prompt"
    size_setting: ClassVar[str | None] = "num_virtual_tokens"

    num_virtual_tokens: int = whole(8)

    def init(self, module: nn.Module) -> dict[str, Tensor]:
        """Nothing: the tokens stand on the embedding."""
        return {}


@dataclass(frozen=True)
class VirtualTokens(OfModel):
    """On the embedding: the ids from -1 down are looked up in ``tokens (n, dim)``."""

    def init(self, module: nn.Module) -> dict[str, Tensor]:
        """The embeddings of random entries of the vocabulary, as in the paper."""
        assert isinstance(module, nn.Embedding)
        n, entries = self.num_virtual_tokens, module.num_embeddings
        chances = torch.ones(entries)
        if module.padding_idx is not None and entries > 1:
            chances[module.padding_idx] = 0
        ids = torch.multinomial(chances, n, replacement=n >= entries)
        rows = module(ids.to(module.weight.device))
        return {"tokens": rows.detach().to(**self.like(module.weight), copy=True)}

    def reset(self, module: nn.Module) -> dict[str, Tensor]:
        """Normal with a standard deviation of 0.02, as the vocabulary may have no values yet."""
        made = self.init(module)["tokens"]
        return {"tokens": torch.randn_like(made) * 0.02}

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The embeddings of ids, virtual ones among them."""
        ids, *rest = args or tuple(kwargs.values())
        plain = forward(ids.clamp(min=0), *rest)
        virtual = F.embedding((-1 - ids).clamp(min=0), parameters["tokens"]).to(plain.dtype)
        return torch.where((ids < 0).unsqueeze(-1), virtual, plain)


@dataclass(frozen=True)
class PromptedModel(OfModel):
    """On the model: virtual tokens come first, and are taken out of what it gives."""

    strip: bool = flag(True)
    first_position: int = whole(0, least=0, enters_weight=False)
    positions: int | None = whole(None, enters_weight=False)

    def fit(self, module: nn.Module) -> Self:
        """The same with the positions that the model has."""
        first, number = _positions(module)
        if number is not None and self.num_virtual_tokens >= number:
            raise AdaptationError(
                f"{self.num_virtual_tokens} virtual tokens leave no room in {number} positions"
            )
        return replace(self, first_position=first, positions=number)

    def call(
        self,
        module: Any,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the model gives for the virtual tokens and those after them."""
        given = Arguments(module, args, kwargs, self.name)
        named, n = given.named, self.num_virtual_tokens
        x = named.get("input_ids")
        x = named.get("inputs_embeds") if x is None else x
        if not isinstance(x, Tensor):
            return given.passed_to(forward)  # which says what it expected
        shape, past = x.shape[:2], self._past(module, named, x.shape[1])
        self._extend(module, named, shape[1], past)
        if past:
            return given.passed_to(forward)
        self._extend_others(module, named, shape)
        if x.is_floating_point():
            rows = module.get_input_embeddings()
            tokens = rows._gift_extensions[self.name].tensors(rows)["tokens"]
            named["inputs_embeds"] = in_front(tokens, x, 1)
        else:
            ids = torch.arange(-1, -n - 1, -1, dtype=x.dtype, device=x.device)
            named["input_ids"] = torch.cat([ids.expand(len(x), n), x], 1)
        output = given.passed_to(forward)
        return self._stripped(module, output, n + shape[1]) if self.strip else output

    def _past(self, module: nn.Module, named: Mapping[str, Any], time: int) -> int:
        """How many positions a cache holds, the virtual ones among them; 0 at the beginning."""
        cache = named.get("past_key_values")
        cache = named.get("cache_params") if cache is None else cache
        if cache is None:
            return 0
        if isinstance(cache, tuple):
            past = cache[0][0].shape[-2] if cache else 0
        else:
            try:
                past = int(cache.get_seq_length())
            except ValueError:  # a model without attention has a state instead of positions
                return int(cache.has_previous_state())
        if getattr(cache, "is_compileable", False):
            raise AdaptationError(
                f"{where(module, self.name)} was given a {type(cache).__name__} of fixed length, "
                "which was made without the virtual tokens: use a dynamic cache"
            )
        told = self._told(named)
        if past and told not in (None, past + time - self.num_virtual_tokens):
            raise AdaptationError(
                f"{where(module, self.name)} was given {time} tokens and a cache of {past} "
                f"positions, {self.num_virtual_tokens} of them for virtual tokens, but mask or "
                f"positions for {told} tokens: begin anew, without past_key_values"
            )
        return past

    def _told(self, named: Mapping[str, Any]) -> int | None:
        """How many tokens there are by now, as the mask or the positions say."""
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if isinstance(mask, Tensor):
            return mask.shape[-1]
        if isinstance(positions, Tensor) and positions.ndim == 2:
            # `generate` drops a mask without padding, and cuts what it gives by a cache's length.
            return None if torch.compiler.is_compiling() else int(positions[:, -1].max()) + 1
        return None

    def _extend(self, module: nn.Module, named: dict[str, Any], time: int, past: int) -> None:
        """The mask and the positions."""
        n, first, limit = self.num_virtual_tokens, self.first_position, self.positions
        total = time + (past or n)
        if limit is not None and total - n <= limit < total:
            raise AdaptationError(
                f"{where(module, self.name)} has {limit} positions: {n} virtual tokens leave room "
                f"for {limit - n} others, {total - n} were given"
            )
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            named["attention_mask"] = F.pad(mask, (n, 0), value=1)
        elif mask is not None:
            raise AdaptationError(
                f"{where(module, self.name)} was given an attention_mask that is not (batch, time)"
                ": gift does not know what it is for virtual tokens"
            )
        if isinstance(positions, Tensor):
            own = torch.arange(first, first + n, dtype=positions.dtype, device=positions.device)
            own = own.expand(*positions.shape[:-1], n)
            named["position_ids"] = positions + n if past else torch.cat([own, positions + n], -1)

    def _extend_others(self, module: nn.Module, named: dict[str, Any], shape: torch.Size) -> None:
        """Types of tokens and labels; what else goes with the tokens is not known."""
        for name, value in named.items():
            if not isinstance(value, Tensor) or name.startswith(_OF_OTHERS):
                continue
            if value.shape[:2] != shape or value.ndim > 3:
                continue
            if name.endswith("token_type_ids") or name == "labels":
                fill = -100 if name == "labels" else 0
                named[name] = F.pad(value, (self.num_virtual_tokens, 0), value=fill)
            else:
                raise AdaptationError(
                    f"{where(module, self.name)} was given {name} {tuple(value.shape)}, which goes "
                    "with the tokens: gift does not know what it is for virtual ones"
                )

    def _stripped(self, module: Any, output: Any, length: int) -> Any:
        n = self.num_virtual_tokens

        def without(result: Tensor) -> Tensor:
            is_sequence = result.ndim == 3 and result.shape[1] == length
            return result[:, n:] if is_sequence else result

        stripped = with_all_changed(output, without)
        pooler = getattr(module, "pooler", None)
        key = 1 if isinstance(stripped, tuple) else "pooler_output"
        there = len(stripped) > 1 if key == 1 else key in stripped
        if not there or not isinstance(pooler, nn.Module):
            return stripped
        # It reads the first position, where a virtual token stood: let it read the first token.
        return with_items(stripped, {key: _pooled(module, pooler, stripped[0])})


# Extended already, or of something else than these tokens.
_OF_OTHERS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "encoder_",
              "head_mask", "cross_attn_head_mask")  # fmt: skip


def _pooled(module: Any, pooler: nn.Module, hidden: Tensor) -> Tensor:
    if not isinstance(pooler, nn.Linear):
        return pooler(hidden)
    activation = getattr(module, "pooler_activation", None) or module.activation
    return activation(pooler(hidden[:, 0]))


@dataclass(frozen=True)
class PromptedMemory(OfModel):
    """On a decoder: the mask of an encoder's output learns of the virtual tokens in it."""

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the decoder gives."""
        given = Arguments(module, args, kwargs, self.name)
        mask, memory = map(given.named.get, ("encoder_attention_mask", "encoder_hidden_states"))
        n = self.num_virtual_tokens
        if mask is not None and memory is not None and mask.shape[-1] + n == memory.shape[1]:
            given.named["encoder_attention_mask"] = F.pad(mask, (n, 0), value=1)
        return given.passed_to(forward)


def _positions(module: Any) -> tuple[int, int | None]:
    """The first position, and the number of positions of a model that has so many only."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1
        return 0, None
    words = module.get_input_embeddings()
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    padding = [table.padding_idx for table in tables
               if table.num_embeddings == limit and table is not words]  # fmt: skip
    # In RoBERTa and the like, positions begin after the one of padding.
    first = next((index + 1 for index in padding if index is not None), 0)
    return first, limit - first
