"""Actions that wrap a module's forward and leave the module open for later caps; block checks."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.forwards import wrap_forward
from gift.core.iterator import Site
from gift.errors import AdaptationError
from gift.factories.actions import Action
from gift.factories.checks import Check, Test
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
    takes_token_ids,
)
from gift.wrappers.activated import as_text

NO_BLOCKS = (
    "has no nn.Sequential or nn.ModuleList of modules of one class: say which modules are its "
    "blocks"
)


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
    made = Bottleneck(size=size, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        if cls := reader_of(site.parent, site.name):
            raise AdaptationError(
                f"it is never called, as {cls.__name__} reads its weight: wrap {cls.__name__}"
            )
        method = Bottleneck(**({"size": size} | settings | params)) if params else made
        wrap_forward(site.module, method, site.path)

    return Action(act, open=True)


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
    made = LoReFT(rank=rank, positions=positions, **settings)

    def prepare(network: nn.Module) -> Callable[..., None]:
        def act(*place: Any, **params: Any) -> None:
            site = Site(*place)
            given: Any = {"rank": rank, "positions": positions} | settings | params
            intervene(network, site.module, LoReFT(**given) if params else made, site.path)

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
    made = ActivatedLoRA(rank=rank, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        if cls := reader_of(site.parent, site.name):
            raise AdaptationError(
                f"it is never called, as {cls.__name__} reads its weight: leave it out"
            )
        method = ActivatedLoRA(**({"rank": rank} | settings | params)) if params else made
        wrap_forward(site.module, method, site.path)

    return Action(act, open=True)


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
    made = Prompt(num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        path, module = site.path, site.module
        given = {"num_virtual_tokens": num_virtual_tokens} | settings | params
        if not takes_token_ids(module):
            wrap_forward(module, Prompt(**given) if params else made, path)
            return
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
    made = Prefix(num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        if not takes_token_ids(site.module):
            raise AdaptationError(
                "it is not a language model of transformers, which embeds token ids: a prefix is "
                "put into the cache of one"
            )
        given = {"num_virtual_tokens": num_virtual_tokens} | settings | params
        prefix_language_model(site.module, Prefix(**given) if params else made, site.path)

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
    made = VisualPrompt(num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        site = Site(*place)
        given = {"num_virtual_tokens": num_virtual_tokens} | settings | params
        method = VisualPrompt(**given) if params else made
        prompt_blocks(_stack(site.module, blocks), method, deep, site.path)

    return Action(act, open=True)


def _stack(network: nn.Module, path: str | None) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a network, which are called one after another, with their paths."""
    if path is not None:
        try:
            rows = {path: [*network.get_submodule(path).children()]}
        except AttributeError:
            raise AdaptationError(f"it has no {path!r}, which blocks= names") from None
    else:
        rows = {name: row for name, part in network.named_modules() if (row := _row(part))}
    longest = max(rows.values(), key=len, default=[])
    if not longest:
        raise AdaptationError(NO_BLOCKS)
    kind = plain_class(type(longest[0]))
    alike = [name for name, row in rows.items() if plain_class(type(row[0])) is kind]
    if len(alike) > 1:
        raise AdaptationError(f"its blocks are in several stages, {alike}: say which, blocks=")
    (name,) = alike
    return [(joined(name, own), part) for own, part in network.get_submodule(name).named_children()
            if part in longest]  # fmt: skip


@recorded
def mc_blocks() -> Check:
    """Match the blocks of a network: consecutive modules of one class.

    The blocks' class is that of the longest ``nn.Sequential`` or ``nn.ModuleList`` whose modules,
    apart from those without parameters, all have one class (encoder layers, residual blocks of a
    stage). All such containers of that class count. A network without blocks is an error.
    """

    def prepare(network: nn.Module) -> Test:
        rows = [row for part in network.modules() if (row := _row(part))]
        longest = max(rows, key=len, default=[])
        if len(longest) < 2:
            raise ValueError(f"the network {NO_BLOCKS}")
        kind = plain_class(type(longest[0]))
        blocks = {id(b) for row in rows for b in row if plain_class(type(b)) is kind}
        return lambda *place: id(Site(*place).module) in blocks

    return Check(prepare=prepare)


def _row(module: nn.Module) -> list[nn.Module]:
    """Return a container's modules that have parameters, if all are of one class, or nothing."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return []
    parts = [part for part in module.children() if any(True for _ in part.parameters())]
    return parts if len({plain_class(type(part)) for part in parts}) == 1 else []
