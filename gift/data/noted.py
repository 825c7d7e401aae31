"""What a network knows of its inputs and outputs, noted on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gift.data.examples import Reader

_NAME = "_gift_noted"


@dataclass(frozen=True)
class Noted:
    """What is known of a network.

    Args:
        reader: makes its inputs; None where that is not known.
        classes: names of what it tells apart; None where these are not known.
        task: what it does.
    """

    reader: Reader | None = None
    classes: tuple[str, ...] | None = None
    task: str = "classification"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Noted":
        return self  # nothing in it changes


def note(net: nn.Module, reader: Reader | None, classes: Sequence[str] | None, task: str) -> None:
    """Note on a network how its inputs are read and what its outputs are.

    Copies and pickles of the network keep it.
    """
    vars(net)[_NAME] = Noted(reader, None if classes is None else tuple(classes), task)


def noted(net: nn.Module) -> Noted:
    """What is noted on a network, also where DDP or ``torch.compile`` wraps it."""
    for name in ("_orig_mod", "module"):
        inner = net._modules.get(name)
        if _NAME not in vars(net) and inner is not None:
            return noted(inner)
    return vars(net).get(_NAME, Noted())
