"""Visual prompts: trained tokens beside the patches of a vision transformer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.forwards import Forward, ForwardMethod, where, wrap_forward
from gift.errors import AdaptationError
from gift.methods.settings import flag, probability, whole
from gift.wrappers.arguments import Arguments
from gift.wrappers.features import inputs_of, weight_beside
from gift.wrappers.tensors import with_first_changed

# Parts of the names of tensors that a block has for each pair of positions.
_OF_PAIRS = ("relative_position", "rel_pos")


@dataclass(frozen=True)
class VisualPrompt(ForwardMethod):
    """Visual prompt tuning (Jia et al. 2022, https://arxiv.org/abs/2203.12119) of one block.

    Trained vectors ``P (n, dim)`` are put beside the tokens ``X`` of an image, and the block with
    its frozen weights reads ``[X; P]``. In a deep prompt, each block has vectors of its own, and
    what the block gives at their places is dropped. In a shallow one, the first block has vectors,
    which go through all blocks, and the last one drops them. A block adds ``tokens (n, dim)``, that
    is ``n * dim`` parameters.

    The order of tokens has no meaning for a block, as positions are added before the first one.
    (The paper puts prompts between ``[CLS]`` and the patches; here they come last, so that all
    tokens keep their index.) So blocks for which it matters are refused: those with causal
    attention, or with a bias for pairs of positions, and calls with masks or rotations of
    positions. Hidden states that a network returns include the vectors of a shallow prompt.

    The vectors start as normal numbers with a standard deviation of 0.02, as position embeddings
    do. (The paper draws uniform numbers of a similar size.)

    Args:
        num_virtual_tokens: `n`.
        adds: whether the block adds vectors; the last block of a shallow prompt does not.
        drops: whether the block drops what it gives at their places; only the last block of a
            shallow prompt does.
        dropout: probability of dropout on the vectors, in training mode.
        dim: number of features; None infers it from the block's first layer.
        dtype: dtype of the new parameters, or its name; None means that of the block, but at least
            float32.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
    """

    name: ClassVar[str] = "visual_prompt"
    size_setting: ClassVar[str | None] = "num_virtual_tokens"

    num_virtual_tokens: int = whole(8)
    adds: bool = flag(True, kw_only=True)
    drops: bool = flag(True, kw_only=True)
    dropout: float = probability(kw_only=True)
    dim: int | None = whole(None, enters_weight=False, kw_only=True)

    def fit(self, module: nn.Module) -> Self:
        """Return the method, if the order of tokens has no meaning for the block."""
        if any(getattr(part, "is_causal", None) is True for part in module.modules()):
            raise AdaptationError(
                "its attention is causal, so that no token would see the prompts: a visual prompt "
                "is for vision transformers"
            )
        tensors = [*module.named_parameters(), *module.named_buffers()]
        if biases := [name for name, _ in tensors if any(part in name for part in _OF_PAIRS)]:
            raise AdaptationError(
                f"its attention has a bias for each pair of positions ({biases[0]}), and none for "
                "prompts"
            )
        return self

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return normal vectors with a standard deviation of 0.02."""
        dim = inputs_of(module) if self.dim is None else self.dim
        if dim is None:
            raise AdaptationError(
                "its first layer takes no tokens (batch, time, dim), as the blocks of a vision "
                "transformer do: give dim= if they do"
            )
        if not self.adds:
            return {}
        like = self.beside(weight_beside(module))
        return {"tokens": torch.randn(self.num_virtual_tokens, dim, **like) * 0.02}

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the block's output for ``[X; P]``."""
        given = Arguments(module, args, kwargs, self.name)
        x = self._checked(module, given)
        length = x.shape[1] if self.adds else x.shape[1] - self.num_virtual_tokens
        if self.adds:
            tokens = F.dropout(parameters["tokens"], self.dropout, module.training)
            tokens = tokens.to(x.dtype).expand(len(x), -1, -1)
            given.named[given.first] = torch.cat([x, tokens], 1)
        output = given.passed_to(forward)
        if not self.drops:
            return output
        return with_first_changed(output, lambda result: result[:, :length])

    def _checked(self, module: nn.Module, given: Arguments) -> Tensor:
        x = given.named.get(given.first)
        if not isinstance(x, Tensor) or x.ndim != 3:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise AdaptationError(
                f"{where(module, self.name)} takes {shape}, visual prompts are for blocks that "
                "take tokens (batch, time, dim)"
            )
        others = ((name, value) for name, value in given.named.items() if name != given.first)
        unknown = [name for name, value in others if _has_tensor(value)]
        if unknown:
            raise AdaptationError(
                f"{where(module, self.name)} was given {unknown}, which gift does not know for the "
                "tokens of a visual prompt (masks, rotations of positions)"
            )
        return x


def _has_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def prompt_blocks(
    blocks: Sequence[tuple[str, nn.Module]], method: VisualPrompt, deep: bool, path: str = ""
) -> None:
    """Put trained tokens beside those of an image.

    Args:
        blocks: the blocks in the order in which they are called, with their paths.
        method: the number of tokens, and how they are trained.
        deep: whether each block has tokens of its own; False for tokens of the first one that go
            through all of them.
        path: path of the network with the blocks, for messages.

    Raises:
        AdaptationError: if that is not possible. Some blocks may be wrapped by then.
    """
    last = len(blocks) - 1
    for i, (name, block) in enumerate(blocks):
        adds, drops = deep or i == 0, deep or i == last
        own = replace(method, adds=adds, drops=drops)
        if adds or drops:
            wrap_forward(block, own, joined(path, name))
        else:
            own.fit(block)
