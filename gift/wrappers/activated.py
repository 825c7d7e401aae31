"""Activated LoRA: deltas that act from an invocation in the text on.

A model reads a text with its frozen weights until a sequence of tokens that invokes the delta. So
the cache of everything before is that of the base model, and can be shared with it and with other
activated deltas. Two wrappers work together: that of the language model finds the invocation among
the token ids, and those of linear layers add their deltas at the positions from there on.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.core.forwards import Forward, ForwardMethod, where
from gift.errors import AdaptationError
from gift.layers.table import dotted, forwards_of
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import number, probability, setting, whole
from gift.support.contexts import holding
from gift.wrappers.arguments import Arguments, in_order
from gift.wrappers.caches import caches_in, is_empty, is_tuples, items_of, length_of
from gift.wrappers.features import features_of, weight_beside
from gift.wrappers.positions import CALLED_OUTSIDE, current_positions, providing_positions
from gift.wrappers.tensors import first_tensor
from gift.wrappers.text_models import prompt_of

_PROMPT: ContextVar[Tensor | None] = ContextVar("prompt", default=None)
"""The token ids ``(batch, time)`` that the running generation was given; one row may be several."""
_NOTE = "_gift_activated_from"
_NEVER = 2**62
_LINEAR = frozenset(forwards_of("linear", "transposed linear"))


def as_text(tokens: Any) -> str:
    """Return token ids as the setting that files hold.

    Raises:
        ValueError: if they are not ids.
    """
    ids = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    if not is_invocation(ids):
        raise ValueError(
            f"invocation_tokens is {tokens!r}, expected the ids of at least one token, as a "
            "tokenizer gives them without special tokens"
        )
    return " ".join(map(str, ids))


def is_invocation(value: Any) -> bool:
    """Whether a value is a sequence of token ids."""
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_id, value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and all(v.isdecimal() for v in value.split(" "))


@dataclass(frozen=True)
class Invocation(ForwardMethod):
    """Wraps a language model: finds the last invocation in each row of its token ids.

    In ``generate()`` these are the given ones: what it writes invokes nothing. So a row is computed
    in one way with and without a cache, and beams that change places are of one prompt.

    Args:
        tokens: the ids of the invocation, separated by spaces.
    """

    name: ClassVar[str] = "invocation"

    tokens: str = setting("0", "ids of tokens, separated by spaces", _is_text)

    @property
    def ids(self) -> list[int]:
        """The ids of the invocation."""
        return [int(item) for item in self.tokens.split(" ")]

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return no parameters."""
        return {}

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the model while the positions from the invocation on are active."""
        given = Arguments(module, args, kwargs, self.name)
        ids = given.named.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise AdaptationError(
                f"{where(module, self.name)} was called without input_ids (batch, time), in which "
                "the invocation is found"
            )
        if any(map(is_tuples, given.named.values())):
            raise AdaptationError(
                f"{where(module, self.name)} was given a cache of tuples, in which nothing can be "
                "noted: give an object, as transformers makes"
            )
        caches = caches_in(given.named.values())
        past, starts = self._known(module, caches, ids)
        text, begin = (ids, past) if (prompt := _PROMPT.get()) is None else (prompt, 0)
        found = self.start(text).to(ids.device).repeat_interleave(len(ids) // len(text))
        starts = torch.where(found < text.shape[1], begin + found, starts)
        places = past + torch.arange(ids.shape[1], device=ids.device)
        with providing_positions(module, self.name, places >= starts[:, None]):
            output = given.passed_to(forward)
        for cache in caches_in([*caches, *items_of(output)]):
            cache.__dict__[_NOTE] = starts
        return output

    def _known(self, module: Any, caches: list[Any], ids: Tensor) -> tuple[int, Tensor]:
        """Return how many positions are in the cache, and where each row became active there."""
        never = torch.full((len(ids),), _NEVER, device=ids.device)
        if not caches or is_empty(caches[0]):
            return 0, never
        past, noted = length_of(caches[0]), caches[0].__dict__.get(_NOTE)
        if past is None:
            raise AdaptationError(
                f"{where(module, self.name)} was given a {type(caches[0]).__name__}, which does "
                "not say how many positions it holds"
            )
        if noted is None:  # of a text before the invocation, which the base model may have read
            return past, never
        if len(noted) != len(ids):
            raise AdaptationError(
                f"{where(module, self.name)} gets {len(ids)} rows with a cache of {len(noted)}: "
                "which of them are active is not known"
            )
        noted = noted.to(ids.device)
        return past, torch.where(noted < past, noted, never)  # a cache may have been cropped

    def generating(
        self, module: nn.Module, named: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Context in which the given tokens are those that may invoke."""
        return holding(_PROMPT, prompt_of(named))

    def start(self, ids: Tensor) -> Tensor:
        """Return where the last invocation in each row begins; the number of positions if never."""
        wanted = torch.tensor(self.ids, device=ids.device, dtype=ids.dtype)
        if ids.shape[1] < len(wanted):
            return torch.full((len(ids),), ids.shape[1], device=ids.device)
        found = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
        places = torch.arange(found.shape[1], device=ids.device)
        last = torch.where(found, places, -1).amax(1)
        return torch.where(last < 0, ids.shape[1], last)


@dataclass(frozen=True)
class ActivatedLoRA(ForwardMethod):
    r"""Activated LoRA (Greenewald et al. 2025, https://arxiv.org/abs/2504.12397).

    .. math:: y_t = W_0 x_t + b + [t \ge t_0] \, \frac{\alpha}{r} B A x_t

    for the position `t` of a token and the position `t_0` at which the last invocation in its row
    begins; a row without one is computed by the frozen weights. It adds ``alora_B (out, r)``, which
    starts at zero, and ``alora_A (r, in)``, Kaiming-uniform as in `LoRA`: ``r (in + out)``
    parameters. The language model around the layer is wrapped as well, and finds `t_0`.

    A delta of a position, not of a weight: it cannot be merged.

    Args:
        rank: `r`.
        lora_alpha: :math:`\alpha`; None means `r`.
        lora_dropout: probability of dropout on the input of `A`, in training mode.
        dtype: dtype of the new parameters, or its name; None means that of the module, but at least
            float32. The result is rounded once, to the dtype of the output.
    """

    name: ClassVar[str] = "alora"
    size_setting: ClassVar[str | None] = "rank"

    rank: int = whole(8)
    lora_alpha: float | None = number(None)
    lora_dropout: float = probability()

    @property
    def scaling(self) -> float:
        """:math:`\\alpha / r`."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    def init_parameters(self, module: Any) -> dict[str, Tensor]:
        """Return `B`, which is zero, and a random `A`."""
        if dotted(plain_class(type(module)).forward) not in _LINEAR:
            raise AdaptationError("activated LoRA is for linear layers")
        features = features_of(module)
        outputs, inputs = features.outputs, features.inputs
        assert inputs is not None
        if self.rank > min(outputs, inputs):
            raise AdaptationError(
                f"rank is {self.rank}, expected {min(outputs, inputs)} or less for "
                f"{inputs} inputs and {outputs} outputs"
            )
        like = self.beside(weight_beside(module))
        a = kaiming_uniform(self.rank, inputs, **like)
        return {"B": torch.zeros(outputs, self.rank, **like), "A": a}

    def has_effect(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether `B` is no longer zero."""
        return bool(parameters["B"].any())

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the layer, and add the delta at active positions."""
        active = current_positions(Invocation.name)
        names: Any = module._gift_arguments
        x = first_tensor(in_order(names, args, kwargs))
        output = forward(*args, **kwargs)
        assert x is not None
        if active is None:
            raise AdaptationError(f"{where(module, self.name)} {CALLED_OUTSIDE}")
        if active.numel() * x.shape[-1] != x.numel():
            raise AdaptationError(
                f"{where(module, self.name)} gets {tuple(x.shape)}, expected one vector for each "
                f"of {tuple(active.shape)} tokens: leave this layer out"
            )
        a, b = parameters["A"], parameters["B"]
        seen = F.dropout(x.to(a.dtype), self.lora_dropout, module.training)
        delta = F.linear(F.linear(seen, a), b) * self.scaling
        delta = torch.where(active.reshape(*x.shape[:-1], 1), delta, 0)
        return (output + delta).to(output.dtype)
