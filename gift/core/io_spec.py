"""What a network knows of its inputs and outputs, noted on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gift.private.torch import COMPILED

if TYPE_CHECKING:
    from gift.data.examples import Reader

NOTE = "_gift_noted"
"""The attribute of a network."""


@dataclass(frozen=True)
class Noted:
    """What is known of a network.

    Args:
        reader: makes its inputs; None where that is not known.
        classes: names of what it tells apart; None where these are not known.
        task: what it does.
    """

    reader: "Reader | None" = None
    classes: tuple[str, ...] | None = None
    task: str = "classification"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Noted":
        return self  # nothing in it changes

    def to_config(self, folder: Path | None = None) -> dict[str, Any]:
        """Itself as plain data.

        Args:
            folder: gets the files that the reader needs, as of a tokenizer. Without one, such a
                reader is left out.
        """
        reader = self.reader
        if folder is None and reader is not None and not reader.stands_alone:
            reader = None
        return {
            "task": self.task,
            "classes": None if self.classes is None else list(self.classes),
            "reader": None if reader is None else reader.to_config(folder),
        }


def note(
    net: nn.Module, reader: "Reader | None", classes: Sequence[str] | None, task: str
) -> None:  # fmt: skip
    """Note on a network how its inputs are read and what its outputs are.

    Copies and pickles of the network keep it. What is noted while it is being fine-tuned is gone
    when that is disabled.
    """
    vars(net)[NOTE] = Noted(reader, None if classes is None else tuple(classes), task)


def noted(net: nn.Module) -> Noted:
    """What is noted on a network, also where DDP or ``torch.compile`` wraps it."""
    for name in (COMPILED, "module"):
        inner = net._modules.get(name)
        if NOTE not in vars(net) and inner is not None:
            return noted(inner)
    return vars(net).get(NOTE, Noted())


def renew_note(net: nn.Module) -> None:
    """Begin a note of its own, with what is known so far: fine-tuning begins.

    The old one is in the way back then, as all that is changed on a module.
    """
    vars(net)[NOTE] = replace(noted(net))


def drop_empty_note(net: nn.Module) -> None:
    """Leave nothing on a network of which nothing is known; the way back has what stood there."""
    if noted(net) == Noted():
        vars(net).pop(NOTE, None)


def forget_classes(net: nn.Module) -> None:
    """The head is another one now, whose classes nobody has named yet."""
    vars(net)[NOTE] = replace(noted(net), classes=None)


def read_note(config: Mapping[str, Any]) -> Noted:
    """What `Noted.to_config` made plain.

    Raises:
        ValueError: if it describes no reader.
    """
    reader = config["reader"]
    if reader is not None:
        from gift.data.readers import reader_from_config  # which few files need

        reader = reader_from_config(reader)
    classes = config["classes"]
    return Noted(reader, None if classes is None else tuple(classes), config["task"])


def put_note(net: nn.Module, told: Noted) -> None:
    """Note that; where it has no reader, that of the base stays."""
    vars(net)[NOTE] = replace(told, reader=told.reader or noted(net).reader)
    drop_empty_note(net)
