"""Pairs of texts that belong together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from gift.data.examples import Examples, Reader
from gift.data.tables import Column, read_table
from gift.errors import DataError, refuse


class TextPairs(Dataset[dict[str, Any]]):
    """Pairs of texts, each with the number of its pair.

    Args:
        pairs: the texts.
        numbers: the same for pairs that belong together.
        reader: reads a text.
    """

    def __init__(self, pairs: list[tuple[str, str]], numbers: list[int], reader: Reader) -> None:
        self.pairs, self.numbers, self.reader = pairs, numbers, reader

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> dict[str, Any]:
        first, second = self.pairs[place]
        return {"first": self.reader(first), "second": self.reader(second),
                "labels": self.numbers[place]}  # fmt: skip


class CollatePairs:
    """Collates the first texts of a batch, then the second ones, into one batch of twice the size.

    Args:
        reader: collates texts.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        """Return the batch; the two texts of a pair have the same label."""
        texts = [item[side] for side in ("first", "second") for item in items]
        labels = torch.tensor([item["labels"] for item in items] * 2)
        batch = self.reader.collate(texts)
        return {**batch, "labels": labels} if isinstance(batch, Mapping) else (batch, labels)


def text_pairs(
    path: str | Path,
    reader: Reader,
    first: Column = "first",
    second: Column = "second",
    delimiter: str | None = None,
) -> Examples:
    """Load pairs of texts that belong together, such as questions and their answers.

    All other texts of a batch are those that do not belong: large batches teach more. Pairs with
    the same first, or the same second text belong together, too.

    Args:
        path: path of the CSV or TSV table.
        reader: converts texts to token ids: `TextReader`.
        first: column of the first texts: its name in the header, or its number from 0.
        second: column of the second texts.
        delimiter: delimiter of columns; None chooses it by the file name.

    Raises:
        DataError: naming all rows that are incomplete, or if there are fewer than two pairs.
    """
    rows = read_table(path, (first, second), delimiter)
    pairs = [(values[0], values[1]) for values in rows.values]
    if len(set(pairs)) < 2:
        refuse(DataError, str(path), ["there is one pair: nothing to tell it apart from"])
    groups: dict[tuple[int, str], int] = {}
    numbers: list[int] = []
    for number, pair in enumerate(pairs):
        keys = [(side, text) for side, text in enumerate(pair)]
        known = next((groups[key] for key in keys if key in groups), number)
        groups.update(dict.fromkeys(keys, known))
        numbers.append(known)
    return Examples(
        TextPairs(pairs, numbers, reader), "contrastive", None, CollatePairs(reader), reader
    )
