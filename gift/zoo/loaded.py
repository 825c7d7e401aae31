"""A network that was loaded by name, with its reader and classes."""

from dataclasses import dataclass

from torch import nn

from gift.data.examples import Reader


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and what is needed to use it.

    Args:
        net: the network.
        reader: converts inputs as the weights expect them; None if that is not known.
        task: "classification", "language" or "detection".
        classes: names of the classes that the weights know; None if they are not known.
    """

    net: nn.Module
    reader: Reader | None
    task: str
    classes: tuple[str, ...] | None = None
