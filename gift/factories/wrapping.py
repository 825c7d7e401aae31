"""Actions that extend the call of a module and leave it open for other caps; blocks to extend."""

from typing import Any

from torch import nn

from gift.core.dynamic_class import plain_class
from gift.core.forwards import wrap_forward
from gift.errors import AdaptationError
from gift.factories.actions import Action
from gift.factories.checks import Check, Test
from gift.factories.serializable import recorded
from gift.layers.table import reader_of
from gift.wrappers import (
    Bottleneck,
    Prompt,
    VirtualTokens,
    prompt_language_model,
    takes_token_ids,
)


@recorded
def ma_bottleneck(size: int = 16, **settings: Any) -> Action:
    """Extend the module by a bottleneck adapter and leave it open; see `gift.wrappers.Bottleneck`.

    Caps after this one are tried on the same module and on what is inside it, so that one strategy
    can put bottlenecks after blocks, adapt layers in the blocks and replace the head.

    Args:
        size: width of the bottleneck.
        settings: ``activation``, ``scaling``, ``parallel``, ``dropout``, ``dim``, ``axis`` and
            ``dtype`` of `gift.wrappers.Bottleneck`.

    Raises:
        ValueError: for values out of range.
    """
    made = Bottleneck(size=size, **settings)

    def act(*place: Any, **params: Any) -> None:
        parent, name, path, _, module = place
        if cls := reader_of(parent, name):
            raise AdaptationError(
                f"it is never called, as {cls.__name__} reads its weight: extend {cls.__name__}"
            )
        method = Bottleneck(**({"size": size} | settings | params)) if params else made
        wrap_forward(module, method, path)

    return Action(act, open=True)


@recorded
def ma_prompt(num_virtual_tokens: int = 8, **settings: Any) -> Action:
    """Extend the module by prompt tuning and leave it open; see `gift.wrappers.Prompt`.

    A language model of transformers may be given with its head; all others take embeddings.

    Args:
        num_virtual_tokens: how many vectors stand before each sequence.
        settings: ``dim``, ``batch_first``, ``strip`` and ``dtype`` of `gift.wrappers.Prompt`; of a
            language model, ``dtype`` only.

    Raises:
        ValueError: for values out of range.
    """
    made = Prompt(num_virtual_tokens=num_virtual_tokens, **settings)

    def act(*place: Any, **params: Any) -> None:
        path, module = place[2], place[4]
        given = {"num_virtual_tokens": num_virtual_tokens} | settings | params
        method = Prompt(**given) if params else made
        if not takes_token_ids(module):
            wrap_forward(module, method, path)
            return
        unused = sorted(set(given) - {"num_virtual_tokens", "dtype"})
        if unused:
            raise AdaptationError(f"a language model tells {unused} itself: leave them out")
        own = VirtualTokens(num_virtual_tokens=method.num_virtual_tokens, dtype=method.dtype)
        prompt_language_model(module, own, path)

    return Action(act, open=True)


@recorded
def mc_blocks() -> Check:
    """The blocks of a network: modules of one class that follow each other.

    They are found where most modules of one class stand in one ``nn.Sequential`` or
    ``nn.ModuleList`` that has no others (encoder layers, residual blocks of a stage), and in all
    such containers of that class. A network without any is an error.
    """

    def prepare(network: nn.Module) -> Test:
        rows = [row for part in network.modules() if (row := _row(part))]
        longest = max(rows, key=len, default=[])
        if len(longest) < 2:
            raise ValueError(
                "the network has no nn.Sequential or nn.ModuleList of modules of one class: say "
                "which modules are its blocks"
            )
        kind = plain_class(type(longest[0]))
        blocks = {id(b) for row in rows for b in row if plain_class(type(b)) is kind}
        return lambda *place: id(place[4]) in blocks

    return Check(prepare=prepare)


def _row(module: nn.Module) -> list[nn.Module]:
    """What stands in a container, if that is of one class; parts without parameters aside."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return []
    parts = [part for part in module.children() if any(True for _ in part.parameters())]
    return parts if len({plain_class(type(part)) for part in parts}) == 1 else []
