"""LoReFT: an intervention on hidden states in a low-rank subspace."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.forwards import Forward, ForwardMethod, forward_deltas, where, wrap_forward
from gift.errors import AdaptationError
from gift.methods.settings import flag, probability, setting, whole
from gift.support.contexts import holding
from gift.wrappers.arguments import Arguments
from gift.wrappers.caches import caches_in, is_empty, is_tuples
from gift.wrappers.features import features_of, weight_beside
from gift.wrappers.positions import CALLED_OUTSIDE, current_positions, providing_positions
from gift.wrappers.tensors import with_first_changed
from gift.wrappers.text_models import (
    is_encoder,
    prompt_of,
    reads_two_texts,
    takes_token_ids,
    tokens_in,
)

_PATTERN = re.compile(r"f(\d+)(?:\+l(\d+))?|l(\d+)")
_labels: ContextVar[Tensor | None] = ContextVar("_labels", default=None)
_prompt: ContextVar[int | None] = ContextVar("_prompt", default=None)
"""The number of tokens that the running generation was given."""


def _is_positions(value: Any) -> bool:
    return value == "all" or (isinstance(value, str) and any(_ends(value)))


def _ends(positions: str) -> tuple[int, int]:
    """Return how many first and last tokens are meant; zeros if this is not known."""
    found = _PATTERN.fullmatch(positions)
    if found is None:
        return 0, 0
    first, last, alone = (int(number or 0) for number in found.groups())
    return first, last + alone


def _positions() -> Any:
    expected = "'all', or first and last tokens as 'f5+l5', 'f5' or 'l5'"
    return setting("all", expected, _is_positions)


@dataclass(frozen=True)
class LoReFT(ForwardMethod):
    r"""Low-rank linear subspace intervention (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

    The output ``h (..., d)`` of any module, usually of a block, is changed in a subspace of `r`
    dimensions, at chosen positions::

        h' = h + R^T (W h + b - R h)

    The rows of ``R (r, d)`` stay orthonormal: they are the columns of `Q` in the decomposition
    ``QR`` of the trained ``rotation (d, r)``, with the signs that make the diagonal of its second
    factor positive. ``weight (r, d)`` and ``bias (r)`` are `W` and `b`. These are
    ``r (2 d + 1)`` parameters. `W` starts as `R`, and `b` as zero, so that the output is
    bit-identical until the first step. (The authors' code starts with a random `W`.)

    The output may be a tensor, or a tuple, list, mapping or dataclass, whose first tensor is
    changed.

    Positions count the tokens that a language model of transformers is given, without padding. If
    the model generates text and is called with labels for each token, only the tokens before the
    first label count: the prompt, not the answer. A call with a cache that holds tokens changes
    nothing, and ``generate()`` changes only its prompt, with and without a cache. (``"all"``
    changes each token.) In other networks, positions are those along the second-to-last axis.

    Args:
        rank: `r`.
        positions: ``"all"``, or the number of first and last tokens, as ``"f5+l5"``, ``"f5"`` or
            ``"l5"``.
        dropout: probability of dropout on ``W h + b - R h``, in training mode.
        dim: `d`; None infers it from the module's last layer.
        of_text: whether a language model around the module says which positions are meant.
        dtype: dtype of the new parameters, or its name; None means that of the module, but at least
            float32. The result is rounded once, to the dtype of the output.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
    """

    name: ClassVar[str] = "loreft"
    size_setting: ClassVar[str | None] = "rank"

    rank: int = whole(4)
    positions: str = _positions()
    dropout: float = probability(kw_only=True)
    dim: int | None = whole(None, enters_weight=False, kw_only=True)
    of_text: bool = flag(False, kw_only=True)

    def fit(self, module: nn.Module) -> Self:
        """Return the method, if the module's features are along the last axis."""
        features = features_of(module, self.dim)
        if features.axis != -1:
            raise AdaptationError(
                "its features are not along the last axis of its output, as those of a "
                "convolution: LoReFT is for hidden states (..., d)"
            )
        if self.rank > features.outputs:
            raise AdaptationError(f"rank={self.rank} is above its {features.outputs} features")
        return self

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return a random subspace; `W` is `R`, and `b` zero."""
        weight, d = weight_beside(module), features_of(module, self.dim).outputs
        if weight is not None and weight.is_complex():
            raise AdaptationError("its parameters are complex, expected real features")
        like = self.beside(weight)
        rotation = _rows(torch.randn(d, self.rank, **like)).T.contiguous()
        return {
            "rotation": rotation,
            "weight": _rows(rotation),
            "bias": torch.zeros(self.rank, **like),
        }

    def has_effect(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether `W` is no longer `R`, or `b` no longer zero."""
        change = parameters["weight"] - _rows(parameters["rotation"])
        return bool(change.any()) or bool(parameters["bias"].any())

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute ``h'``."""
        changed = with_first_changed(
            forward(*args, **kwargs), lambda h: self._intervened(module, parameters, h)
        )
        if changed is None:
            raise AdaptationError(f"{where(module, self.name)} returns no tensor to change")
        return changed

    def _intervened(self, module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor) -> Tensor:
        weight, rows = parameters["weight"], _rows(parameters["rotation"])
        if not h.is_floating_point() or h.shape[-1] != weight.shape[1]:
            raise AdaptationError(
                f"{where(module, self.name)} gives {h.dtype} of shape {tuple(h.shape)}, its "
                f"intervention is for {weight.shape[1]} features: give dim= where it is made"
            )
        chosen = None if self.positions == "all" else self._chosen(module, h)
        x = h.to(weight.dtype)
        # Not one product with W - R: where these are equal, so are the products, bit by bit.
        change = F.linear(x, weight) - F.linear(x, rows) + parameters["bias"]
        delta = F.linear(F.dropout(change, self.dropout, module.training), rows.T)
        # Subtract, since adding zero would change an output of -0.0.
        new = (h - (0.0 - delta)).to(h.dtype)
        return new if chosen is None else torch.where(chosen.unsqueeze(-1), new, h)

    def _chosen(self, module: nn.Module, h: Tensor) -> Tensor:
        """Return the chosen positions ``(batch, time)`` or ``(time)``."""
        if not self.of_text:
            if h.ndim < 2:
                raise AdaptationError(f"{where(module, self.name)} gives no sequence")
            return at_ends(
                torch.ones(h.shape[-2], dtype=torch.bool, device=h.device), self.positions
            )
        chosen = current_positions(Positions.name)
        if chosen is None:
            raise AdaptationError(f"{where(module, self.name)} {CALLED_OUTSIDE}")
        if chosen.shape != h.shape[:-1]:
            raise AdaptationError(
                f"{where(module, self.name)} gives {tuple(h.shape)}, and the positions that the "
                f"language model around it chose are those of {tuple(chosen.shape)} tokens: "
                f"positions={self.positions!r} cannot be found"
            )
        return chosen.to(h.device)


def _rows(rotation: Tensor) -> Tensor:
    """Return `R`: the columns of `Q`, where the second factor has a positive diagonal."""
    wide = rotation.to(torch.promote_types(rotation.dtype, torch.float32))
    q, r = torch.linalg.qr(wide)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.to(rotation.dtype).contiguous()


def at_ends(tokens: Tensor, positions: str) -> Tensor:
    """Return which of the tokens are the first and last ones.

    Args:
        tokens: ``(..., time)``, True where there is a token.
        positions: as a setting of `LoReFT`, not ``"all"``.
    """
    first, last = _ends(positions)
    count = tokens.long().cumsum(-1)
    return tokens & ((count <= first) | (count > count[..., -1:] - last))


@dataclass(frozen=True)
class Positions(ForwardMethod):
    """Wraps a language model: tells the interventions in it which positions are chosen."""

    name: ClassVar[str] = "loreft"

    positions: str = _positions()

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return no parameters: the blocks hold them."""
        return {}

    def call(
        self,
        module: Any,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the model, whose interventions ask for the chosen positions meanwhile."""
        named = Arguments(module, args, kwargs, self.name).named
        x = tokens_in(named)
        if x is None:
            return forward(*args, **kwargs)
        with providing_positions(module, self.name, self._tokens(module, named, x)):
            return forward(*args, **kwargs)

    def _tokens(self, module: Any, named: Mapping[str, Any], x: Tensor) -> Tensor:
        shape = x.shape[:2]
        caches = [*caches_in(named.values()), *filter(is_tuples, named.values())]
        if any(not is_empty(cache) for cache in caches):
            return torch.zeros(shape, dtype=torch.bool, device=x.device)
        mask, labels = named.get("attention_mask"), named.get("labels")
        labels = _labels.get() if labels is None else labels
        if isinstance(mask, Tensor) and mask.shape != shape:
            raise AdaptationError(
                f"{where(module, self.name)} was given an attention_mask {tuple(mask.shape)} for "
                f"{tuple(shape)} tokens: expected (batch, time)"
            )
        if mask is None:
            mask = torch.ones(shape, device=x.device)
        tokens, prompt_length = mask.bool(), _prompt.get()
        if prompt_length is not None:  # without a cache, it reads again what it wrote
            tokens = tokens & (torch.arange(shape[1], device=x.device) < prompt_length)
        if isinstance(labels, Tensor) and labels.shape == shape and _writes(module):
            counted = (labels != -100).long().cumsum(-1) > 0
            prompt = tokens & ~counted
            tokens = torch.where(prompt.any(-1, keepdim=True), prompt, tokens)
        return at_ends(tokens, self.positions)

    def generating(self, module: Any, named: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Context in which what comes after the given tokens is known to be written."""
        ids = prompt_of(named)
        if ids is None and named.get("inputs_embeds") is not None:
            return holding(_prompt, None)
        return holding(_prompt, 1 if ids is None else ids.shape[1])  # one that begins the text


def labelled(labels: Tensor | None) -> AbstractContextManager[None]:
    """Context in which language models are called without the labels of their tokens.

    A loop that computes the loss itself tells interventions in this way where prompts end.

    Args:
        labels: ``(batch, time)``, -100 for what is not learnt; or None.
    """
    return holding(_labels, labels)


def _writes(model: Any) -> bool:
    """Whether the labels of a model are the tokens that it writes, not properties of tokens."""
    generates = getattr(model, "can_generate", None)
    return callable(generates) and generates() is True and not is_encoder(model)


def intervene(network: nn.Module, module: nn.Module, method: LoReFT, path: str) -> None:
    """Add an intervention to a module, and tell it positions if a language model is around it.

    Args:
        network: the network.
        module: a module in it.
        method: the intervention.
        path: path of the module in the network.

    Raises:
        AdaptationError: if that is not possible.
    """
    found = None
    if method.positions != "all":
        around = ((name, m) for name, m in network.named_modules() if m is not module)
        texts = ((name, m) for name, m in around if takes_token_ids(m))
        found = next(((name, m) for name, m in texts if module in m.modules()), None)
    if found is not None:
        name, model = found
        if reads_two_texts(model):
            raise AdaptationError(
                "it is in an encoder-decoder model, which reads two texts: positions='all' alone "
                "is understood"
            )
        present: Any = forward_deltas(model).get(method.name)
        if present is None:
            wrap_forward(model, Positions(method.positions), name)
        elif present.method != Positions(method.positions):
            raise AdaptationError(
                f"other interventions are at {present.method.positions}: one model has one choice "
                "of positions"
            )
        method = replace(method, of_text=True)
    wrap_forward(module, method, path)
