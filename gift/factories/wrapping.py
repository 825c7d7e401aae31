"""Actions that wrap a module's forward pass and leave the module open for later caps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torch import nn

from gift.core.forwards import ForwardMethod, wrap_forward
from gift.core.iterator import Site
from gift.errors import AdaptationError
from gift.factories.actions import Action
from gift.factories.blocks import stack_of
from gift.factories.serializable import recorded
from gift.layers.table import reader_of
from gift.wrappers import (
    ActivatedLoRA,
    Bottleneck,
    Invocation,
    LoReFT,
    Prefix,
    Prompt,
    VirtualTokens,
    VisualPrompt,
    intervene,
    prefix_language_model,
    prompt_blocks,
    prompt_language_model,
    reads_two_texts,
    takes_token_ids,
)
from gift.wrappers.activated import as_text
from gift.wrappers.text_models import embedding_of

M = TypeVar("M", bound=ForwardMethod)


def _method(make: Callable[..., M], /, **settings: Any) -> Callable[[dict[str, Any]], M]:
    """Return a function from a cap's parameters, which override the settings, to the method.

    Raises:
        ValueError: at once, if settings are out of range.
    """
    made = make(**settings)
    return lambda params: make(**(settings | params)) if params else made


def _wrapping(method: Callable[[dict[str, Any]], ForwardMethod], instead: str) -> Action:
    """Return an action that wraps modules, but none whose forward is never called.

    Args:
        method: as `_method` returns it.
        instead: what the user could do instead; gets the class that reads the module's weight.
    """

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        if cls := reader_of(site.parent, site.name):
            name = cls.__name__
            raise AdaptationError(
                f"it is never called, as {name} reads its weight: {instead.format(name)}"
            )
        wrap_forward(site.module, method(params), site.path)

    return Action(act, open=True)


@recorded
def ma_bottleneck(size: int = 16, **settings: Any) -> Action:
    """Add a bottleneck adapter to the module and leave it open; see `gift.wrappers.Bottleneck`.

    Later caps are tried on the same module and on what is inside it. So one strategy can add
    bottlenecks after blocks, adapt layers in the blocks and replace the head.

    Args:
        size: width of the bottleneck.
        settings: ``activation``, ``scaling``, ``parallel``, ``dropout``, ``dim``, ``axis`` and
            ``dtype`` of `gift.wrappers.Bottleneck`.

    Raises:
        ValueError: if values are out of range.
    """
    return _wrapping(_method(Bottleneck, size=size, **settings), "wrap {}")


@recorded
def ma_loreft(rank: int = 4, positions: str = "all", **settings: Any) -> Action:
    """Add a LoReFT intervention to the module and leave it open; see `gift.wrappers.LoReFT`.

    Args:
        rank: dimensions of the subspace.
        positions: ``"all"``, or the number of first and last tokens, as ``"f5+l5"``, ``"f5"`` or
            ``"l5"``.
        settings: ``dropout``, ``dim`` and ``dtype`` of `gift.wrappers.LoReFT`.

    Raises:
        ValueError: if values are out of range.
    """
    method = _method(LoReFT, rank=rank, positions=positions, **settings)

    def prepare(network: nn.Module) -> Callable[..., None]:
        def act(*place: Any, **params: Any) -> None:
            site = Site(*place)
            intervene(network, site.module, method(params), site.path)

        return act

    return Action(prepare=prepare, open=True)


@recorded
def ma_invocation(invocation_tokens: Sequence[int]) -> Action:
    """Let a language model find an invocation, and leave it open; see `gift.wrappers.Invocation`.

    Later caps give layers inside of it an activated LoRA, by `ma_activated_lora`.

    Args:
        invocation_tokens: ids of the tokens that invoke the deltas.

    Raises:
        ValueError: if these are not ids.
    """
    method = Invocation(as_text(invocation_tokens))

    def act(*place: Any) -> None:
        site = Site(*place)
        if not takes_token_ids(site.module):
            raise AdaptationError(
                "it is not a language model of transformers, which embeds token ids: an invocation "
                "is found among these"
            )
        if reads_two_texts(site.module):
            raise AdaptationError(
                "it is an encoder-decoder model, which reads two texts: activated LoRA is for "
                "models with one"
            )
        known = getattr(embedding_of(site.module), "num_embeddings", math.inf)
        if unknown := [token for token in method.ids if token >= known]:
            raise AdaptationError(
                f"invocation_tokens has {unknown}, ids beyond the {known} of its embedding, so "
                "that no text would invoke the deltas"
            )
        wrap_forward(site.module, method, site.path)

    return Action(act, open=True)


@recorded
def ma_activated_lora(rank: int = 8, **settings: Any) -> Action:
    """Add a LoRA that acts from an invocation on; see `gift.wrappers.ActivatedLoRA`.

    Args:
        rank: rank of the factors.
        settings: ``lora_alpha``, ``lora_dropout`` and ``dtype`` of `gift.wrappers.ActivatedLoRA`.

    Raises:
        ValueError: if values are out of range.
    """
    return _wrapping(_method(ActivatedLoRA, rank=rank, **settings), "leave it out")


@recorded
def ma_prompt(num_virtual_tokens: int = 8, **settings: Any) -> Action:
    """Add prompt tuning to the module and leave it open; see `gift.wrappers.Prompt`.

    The module may be a language model of transformers, head included. Any other module must take
    embeddings.

    Args:
        num_virtual_tokens: number of vectors in front of each sequence.
        settings: ``dim``, ``batch_first``, ``strip``, ``encoder``, ``encoder_size``,
            ``encoder_layers``, ``encoder_dropout`` and ``dtype`` of `gift.wrappers.Prompt`; for a
            language model not the first three.

    Raises:
        ValueError: if values are out of range.
    """
    method = _method(Prompt, num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        path, module = site.path, site.module
        if not takes_token_ids(module):
            wrap_forward(module, method(params), path)
            return
        given = {"num_virtual_tokens": num_virtual_tokens} | settings | params
        unused = sorted(set(given) - {field.name for field in fields(VirtualTokens)})
        if unused:
            raise AdaptationError(f"a language model sets {unused} itself: leave them out")
        prompt_language_model(module, VirtualTokens(**given), path)

    return Action(act, open=True)


@recorded
def ma_prefix(num_virtual_tokens: int = 8, **settings: Any) -> Action:
    """Add prefix tuning to a language model and leave it open; see `gift.wrappers.Prefix`.

    Args:
        num_virtual_tokens: number of keys and values in front of those of the text.
        settings: ``encoder``, ``encoder_size``, ``layers``, ``heads``, ``head_dim`` and ``dtype``
            of `gift.wrappers.Prefix`.

    Raises:
        ValueError: if values are out of range.
    """
    method = _method(Prefix, num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        if not takes_token_ids(site.module):
            raise AdaptationError(
                "it is not a language model of transformers, which embeds token ids: a prefix is "
                "put into the cache of one"
            )
        prefix_language_model(site.module, method(params), site.path)

    return Action(act, open=True)


@recorded
def ma_visual_prompt(
    num_virtual_tokens: int = 8, deep: bool = False, blocks: str | None = None, **settings: Any
) -> Action:
    """Add visual prompts to a vision transformer and leave it open.

    See `gift.wrappers.VisualPrompt`.

    Args:
        num_virtual_tokens: number of trained vectors beside the tokens of an image.
        deep: whether each block has vectors of its own; False for those of the first block, which
            go through all of them.
        blocks: path of the ``nn.Sequential`` or ``nn.ModuleList`` of the blocks in the module; None
            finds it as `mc_blocks` does.
        settings: ``dropout``, ``dim`` and ``dtype`` of `gift.wrappers.VisualPrompt`.

    Raises:
        ValueError: if values are out of range.
    """
    if not isinstance(deep, bool):  # text, which is true whatever it says
        raise ValueError(f"deep is {deep!r}, expected True or False")
    method = _method(VisualPrompt, num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        prompt_blocks(stack_of(site.module, blocks), method(params), deep, site.path)

    return Action(act, open=True)
