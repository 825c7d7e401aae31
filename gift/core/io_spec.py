"""What a network records about its inputs and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from gift.private.torch.calls import COMPILED

IO_SPEC = "_gift_io_spec"
"""The attribute of a network that holds its `IOSpec`."""


class InputReader(Protocol):
    """The part of `gift.data.Reader` that this package needs."""

    stands_alone: ClassVar[bool]

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """The reader as plain data; files that it needs are written into the folder."""


@dataclass(frozen=True)
class IOSpec:
    """Description of the inputs and outputs of a network.

    Args:
        reader: makes the inputs; None if unknown.
        classes: names of the classes; None if unknown.
        task: the task, as in `gift.data.Examples`.
        details: what else the task must know, as plain data; as in `gift.data.Examples`.
    """

    reader: Any = None
    classes: tuple[str, ...] | None = None
    task: str = "classification"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "IOSpec":
        return self  # immutable

    def to_config(self, folder: Path | None = None) -> dict[str, Any]:
        """The description as plain data.

        Args:
            folder: where to write the files that the reader needs (those of a tokenizer, for
                example). Without a folder, a reader that needs files is left out.
        """
        reader: InputReader | None = self.reader
        if folder is None and reader is not None and not reader.stands_alone:
            reader = None
        return {
            "task": self.task,
            "classes": None if self.classes is None else list(self.classes),
            "reader": None if reader is None else reader.to_config(folder),
            **({"details": dict(self.details)} if self.details else {}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], reader: Any) -> "IOSpec":
        """Make the description from plain data, and a reader.

        Raises:
            KeyError, TypeError, ValueError: if the data does not describe one.
        """
        classes, details = config["classes"], config.get("details", {})
        if not isinstance(config["task"], str) or not isinstance(details, dict):
            raise TypeError("expected the name of a task, and its details by name")
        if classes is not None and not all(isinstance(name, str) for name in classes):
            raise TypeError("expected names of classes")
        return cls(reader, None if classes is None else tuple(classes), config["task"], details)


def set_io_spec(
    net: nn.Module,
    reader: Any,
    classes: Sequence[str] | None,
    task: str,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Store on a network how its inputs are read and what its outputs are.

    Copies and pickles of the network keep this. If it is stored during fine-tuning, disabling
    fine-tuning removes it.
    """
    names = None if classes is None else tuple(classes)
    vars(net)[IO_SPEC] = IOSpec(reader, names, task, dict(details or {}))


def io_spec_of(net: nn.Module) -> IOSpec:
    """The `IOSpec` of a network, also if DDP or ``torch.compile`` wraps it."""
    for name in (COMPILED, "module"):
        inner = net._modules.get(name)
        if IO_SPEC not in vars(net) and inner is not None:
            return io_spec_of(inner)
    spec: IOSpec = vars(net).get(IO_SPEC, IOSpec())
    return spec


def renew_io_spec(net: nn.Module) -> None:
    """Give a network its own equal copy of the `IOSpec` when fine-tuning begins.

    The previous object belongs to the base, and disabling restores it.
    """
    vars(net)[IO_SPEC] = replace(io_spec_of(net))


def drop_empty_io_spec(net: nn.Module) -> None:
    """Remove an `IOSpec` that contains no information."""
    if io_spec_of(net) == IOSpec():
        vars(net).pop(IO_SPEC, None)


def forget_classes(net: nn.Module) -> None:
    """Remove the names of the classes and the details, because the head was replaced."""
    vars(net)[IO_SPEC] = replace(io_spec_of(net), classes=None, details={})


def load_io_spec(net: nn.Module, spec: IOSpec) -> None:
    """Store `spec` on a network; if `spec` has no reader, keep the reader of the base."""
    vars(net)[IO_SPEC] = replace(spec, reader=spec.reader or io_spec_of(net).reader)
    drop_empty_io_spec(net)
