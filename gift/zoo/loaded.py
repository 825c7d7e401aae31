"""A network that was loaded by name, and what came with it."""

from dataclasses import dataclass

from torch import nn

from gift.data.examples import Reader


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and what must be known to use it.

    Args:
        net: the network.
        reader: makes its inputs as its weights expect them; None where that is not known.
        task: "classification", "language" or "detection".
        classes: names of the classes that its weights know; None where these are not known.
    """

    net: nn.Module
    reader: Reader | None
    task: str
    classes: tuple[str, ...] | None = None
