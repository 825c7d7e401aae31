"""Training examples, and the protocol of readers, which read further inputs of their kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.utils.data import Dataset, Subset

IGNORED = -100
"""Targets with this value are ignored."""


class Reader(Protocol):
    """Converts a file, image or text to the input of a network.

    `stands_alone` says whether its plain data describe it completely, without additional files.
    """

    stands_alone: ClassVar[bool]

    def __call__(self, raw: Any) -> Any:
        """Return the input for one example, without random augmentation."""

    def augmented(self, raw: Any) -> Any:
        """Return the input for training, with images randomly cropped and flipped."""

    def collate(self, items: Sequence[Any]) -> Any:
        """Collate inputs from the two methods above into a batch."""

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data, which `gift.data.reader_from_config` converts back.

        Args:
            folder: folder for everything that is not plain data, such as the files of a tokenizer.
        """


@dataclass(frozen=True)
class Examples(Dataset[Any]):
    """Examples, with what a training loop must know about them.

    They are a torch dataset themselves: ``train[0]`` is the first item, and
    ``DataLoader(train, collate_fn=train.collate)`` gives batches.

    Args:
        dataset: dataset with a length and integer indices. An item is a pair of input and target,
            or a dictionary of tensors with "labels", as for transformers.
        task: "classification", "multi_label" (any number of classes for each example),
            "regression", "language" (predict the next token), "segmentation", "detection" or
            "contrastive"; None decides between "classification" and "regression" by targets and
            network.
        classes: names of the classes, in the order of their numbers; None if there are none.
        collate: function that collates items into a batch; None uses torch's default.
        reader: converts files or texts to inputs, for `predict`; None if examples are tensors.
        details: what else the task must know, as plain data: "scale", the mean and deviation of the
            numbers that a network predicts in standardised form.
    """

    dataset: Dataset[Any]
    task: str | None = None
    classes: tuple[str, ...] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    reader: Reader | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch leaves it to each dataset

    def __getitem__(self, place: int) -> Any:
        return self.dataset[place]

    def part(self, places: Sequence[int]) -> "Examples":
        """Return the examples at these indices."""
        return replace(self, dataset=Subset(self.dataset, places))

    def split(self, share: float, seed: int = 0) -> "tuple[Examples, Examples]":
        """Split at random; the second part has this share of the examples, and no augmentation.

        Raises:
            ValueError: if one of the parts would be empty.
        """
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise ValueError(f"a share of {share} of {len(self)} examples leaves one part empty")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        plain = getattr(self.dataset, "plain", lambda: self.dataset)()
        held_out = replace(self, dataset=plain).part(sorted(order[:count]))
        return self.part(sorted(order[count:])), held_out
