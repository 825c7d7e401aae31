"""Examples to learn from, and how more of their kind are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.utils.data import Dataset, Subset

IGNORED = -100
"""Targets with this value count for nothing."""


class Reader(Protocol):
    """Makes the input of a network from a file, picture or text.

    Its `stands_alone` says whether plain data describe it, without files beside them.
    """

    stands_alone: ClassVar[bool]

    def __call__(self, raw: Any) -> Any:
        """The input for one example, without anything random."""

    def augmented(self, raw: Any) -> Any:
        """The same for training, where pictures are cropped and flipped at random."""

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of what the two above gave."""

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Itself as plain data, from which `gift.data.reader_from_config` makes it again.

        Args:
            folder: gets what is no plain data, such as the files of a tokenizer.
        """


@dataclass(frozen=True)
class Examples:
    """Examples, and what a training loop must know of them.

    Args:
        dataset: with a length and an item for each number: a pair of input and target, or a
            dictionary of tensors with "labels" (what transformers takes).
        task: "classification", "language" (predict the next token), "detection" or "regression";
            None leaves "classification" or "regression" to targets and network.
        classes: names of the classes, by their numbers; None where there are none.
        collate: makes a batch of items; None is torch's own.
        reader: makes inputs of files or texts, for `predict`; None where examples are tensors.
    """

    dataset: Dataset[Any]
    task: str | None = None
    classes: tuple[str, ...] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    reader: Reader | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch leaves it to each dataset

    def part(self, places: Sequence[int]) -> "Examples":
        """The examples in these places."""
        return replace(self, dataset=Subset(self.dataset, places))

    def split(self, share: float, seed: int = 0) -> "tuple[Examples, Examples]":
        """Two parts at random, the second with that share of the examples and nothing augmented.

        Raises:
            ValueError: if one of them would be empty.
        """
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise ValueError(f"a share of {share} of {len(self)} examples leaves one part empty")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        plain = getattr(self.dataset, "plain", lambda: self.dataset)()
        held_out = replace(self, dataset=plain).part(sorted(order[:count]))
        return self.part(sorted(order[count:])), held_out
