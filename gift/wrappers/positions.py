"""The positions that the wrapper of a language model passes to the wrappers inside it.

They hold while the model is called. Gradient checkpointing calls parts of the model again in the
backward pass, after the call, and perhaps after other calls; so a function that is checkpointed
keeps what held when it was first called.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gift.core.forwards import where
from gift.errors import AdaptationError
from gift.private.transformers import checkpointing, checkpointing_parts, checkpoints_openly
from gift.support.contexts import holding

P = ParamSpec("P")
T = TypeVar("T")
_POSITIONS: ContextVar[dict[str, Tensor] | None] = ContextVar("positions", default=None)
"""Positions ``(batch, time)`` by the name of the wrapper that they are for."""


@contextmanager
def providing_positions(module: Any, name: str, positions: Tensor) -> Iterator[None]:
    """Context in which wrappers inside a language model get positions.

    Args:
        module: the model, whose parts may checkpoint.
        name: name of the wrappers.
        positions: ``(batch, time)``, True where a token is meant.

    Raises:
        AdaptationError: if a part checkpoints in a way that is not known.
    """
    with holding(_POSITIONS, {**(_POSITIONS.get() or {}), name: positions}):
        parts = checkpointing_parts(module) if torch.is_grad_enabled() else []
        if not parts:
            yield
            return
        if torch.compiler.is_compiling() or not all(map(checkpoints_openly, parts)):
            raise AdaptationError(
                f"{where(module, name)} uses gradient checkpointing, which calls its blocks again "
                "in a way that gift does not know (or compiles): call "
                "gradient_checkpointing_disable()"
            )
        with checkpointing(parts, recomputable):
            yield


def current_positions(name: str) -> Tensor | None:
    """Return the positions of the running call for the wrappers of that name, or None."""
    return (_POSITIONS.get() or {}).get(name)


def recomputable(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that can be called again after the call of the model in which it is made.

    A model of your own that checkpoints parts with activated LoRA or with LoReFT at chosen
    positions gives this to `torch.utils.checkpoint.checkpoint`; models of transformers need
    nothing::

        x = checkpoint(gift.wrappers.recomputable(block), x, use_reentrant=False)

    Args:
        function: what is checkpointed, such as a block.
    """
    kept = _POSITIONS.get()

    @functools.wraps(function)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        with holding(_POSITIONS, kept):
            return function(*args, **kwargs)

    return again


CALLED_OUTSIDE = (
    "was called outside of its language model, which passes it the positions. Gradient "
    "checkpointing of your own does so in the backward pass: checkpoint "
    "gift.wrappers.recomputable(block), not the block"
)
