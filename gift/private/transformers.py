"""Private parts of transformers; see `gift.private`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Function = Callable[..., Any]
CHECKPOINT = "_gradient_checkpointing_func"


def checkpointing_parts(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that call something again for the backward pass, as they say."""
    parts = (part for part in model.modules() if part.training)
    return [part for part in parts if getattr(part, "gradient_checkpointing", False) is True]


def checkpoints_openly(part: nn.Module) -> bool:
    """Whether such a part keeps the function by which it checkpoints where `checkpointing` looks.

    If it does not, the caller refuses gradient checkpointing.
    """
    return callable(part.__dict__.get(CHECKPOINT))


@contextmanager
def checkpointing(
    parts: list[nn.Module], changed: Callable[[Function], Function]
) -> Iterator[None]:
    """Context in which such parts checkpoint what `changed` makes of a function.

    A part keeps the function by which it checkpoints under a private name. Publicly it can be given
    arguments alone, by ``gradient_checkpointing_enable``, of which none reaches the function that
    is called again in both kinds of checkpointing.

    Args:
        parts: each of which `checkpoints_openly`.
        changed: gives for the function that is checkpointed the one in its place.
    """
    own = [(part, part.__dict__[CHECKPOINT]) for part in parts]
    try:
        for part, checkpoint in own:
            part.__dict__[CHECKPOINT] = _through(checkpoint, changed)
        yield
    finally:
        for part, checkpoint in own:
            part.__dict__[CHECKPOINT] = checkpoint


def _through(checkpoint: Function, changed: Callable[[Function], Function]) -> Function:
    def call(function: Function, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(changed(function), *args, **kwargs)

    return call
