"""A network that was loaded by name, with its reader and classes."""

from dataclasses import dataclass

from torch import nn

from gift.data.examples import Reader

HEAD_TASKS = ("classification", "multi_label", "regression")
"""Tasks that differ in the number of outputs of the last layer alone."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and what is needed to use it.

    Args:
        net: the network.
        reader: converts inputs as the weights expect them; None if that is not known.
        task: the task that it is for, as in `gift.data.Examples`.
        classes: names of the classes that the weights know; None if they are not known.
        fresh: names of parameters that the weights lack, which have random values.
    """

    net: nn.Module
    reader: Reader | None
    task: str
    classes: tuple[str, ...] | None = None
    fresh: tuple[str, ...] = ()
