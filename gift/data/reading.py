"""Examples that a reader reads on access."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from gift.data.examples import Examples, Reader
from gift.errors import DataError


class Source(Protocol):
    """Indexed pairs of an input for a reader and a label; a list of pairs will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> tuple[Any, Any]: ...


class ReadDataset(Dataset[Any]):
    """Pairs of input and label, or dictionaries with "labels" if the reader returns dictionaries.

    Args:
        source: pairs of an input for the reader and a label.
        reader: reads the inputs.
        augment: whether to crop and flip images at random.
    """

    def __init__(self, source: Source, reader: Reader, augment: bool = False) -> None:
        self.source, self.reader, self.augment = source, reader, augment

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int) -> Any:
        if not -len(self) <= place < len(self):
            raise IndexError(place)  # ends iteration over the dataset
        raw, label = self.source[place]
        read = self.reader.augmented if self.augment else self.reader
        found = read(raw)
        return {**found, "labels": label} if isinstance(found, Mapping) else (found, label)

    def plain(self) -> "ReadDataset":
        """Return the same dataset without random augmentation."""
        return ReadDataset(self.source, self.reader)


@dataclass(frozen=True)
class Collate:
    """Collates items of `ReadDataset` into a batch.

    Args:
        reader: collates the inputs.
    """

    reader: Reader

    def __call__(self, items: list[Any]) -> Any:
        """Return the batch, a pair or a dictionary like the items."""
        if isinstance(items[0], Mapping):
            labels = [item["labels"] for item in items]
            inputs = [{k: v for k, v in item.items() if k != "labels"} for item in items]
            return {**self.reader.collate(inputs), "labels": torch.tensor(labels)}
        inputs = [read for read, _ in items]
        return self.reader.collate(inputs), torch.tensor([label for _, label in items])


def read_examples(
    source: Source,
    reader: Reader,
    augment: bool = False,
    classes: Sequence[str] | None = None,
) -> Examples:
    """Create examples from a source, for classification unless `Targets.of` says otherwise."""
    if not callable(reader):
        raise DataError(
            f"the reader is {reader!r}, expected one of gift.data: PictureReader(size=224), "
            "TextReader(tokenizer), or that of gift.zoo.load_network(...)"
        )
    return Examples(
        ReadDataset(source, reader, augment),
        "classification",
        classes=None if classes is None else tuple(classes),
        collate=Collate(reader),
        reader=reader,
    )
