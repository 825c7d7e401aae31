"""Torchvision datasets by name."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gift.data.classes import classes_of, distinct
from gift.data.examples import Examples, Reader
from gift.data.reading import read_examples
from gift.errors import DataError, closest, refuse
from gift.support.optional import require


class Images:
    """Images and class numbers from a torchvision dataset.

    Args:
        dataset: the dataset.
        name: name of the dataset in errors.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        try:
            image, label = self.dataset[place]
            return image, int(label)
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise DataError(f"{self._described(place)} cannot be read: {error}") from error

    def _described(self, place: int) -> str:
        samples = getattr(self.dataset, "samples", None)  # only datasets of folders have it
        return f"example {place} of {self.name}" if samples is None else str(samples[place][0])


def torchvision_dataset(
    name: str,
    root: str | Path,
    split: str | None,
    reader: Reader,
    download: bool = False,
    augment: bool = False,
    classes: Sequence[str] | None = None,
) -> Examples:
    """Load a torchvision dataset for image classification.

    Args:
        name: name of its class in torchvision: "MNIST", "CIFAR10", "ImageNet" and so on.
        root: root folder of the dataset, as for torchvision.
        split: "train", "test" or another split of the dataset; None if it has no splits.
        reader: converts images to tensors: `PictureReader`, or the reader of a network's weights.
        download: download it if it is missing.
        augment: crop and flip images at random, for training.
        classes: other names for the classes.

    Raises:
        DataError: if there is no such dataset or split, or if its files are missing.

    Example:
        >>> from gift.data import PictureReader, torchvision_dataset
        >>> torchvision_dataset("CIFAR", "data", "train", PictureReader(size=32))
        Traceback (most recent call last):
        gift.errors.DataError: torchvision has no data set 'CIFAR', closest: ['CIFAR10', ...
    """
    datasets = require("torchvision.datasets", "vision")
    maker = getattr(datasets, name, None) if name in datasets.__all__ else None
    if not isinstance(maker, type):
        close = closest(name, datasets.__all__)
        raise DataError(f"torchvision has no data set {name!r}, closest: {close}")
    known = inspect.signature(maker).parameters
    options: dict[str, Any] = {"root": str(root), "download": download}
    options = {k: v for k, v in options.items() if k in known} | _split(name, known, split)
    try:
        dataset = maker(**options)
    except TypeError as error:
        raise DataError(f"{name} needs more than a folder: {error}") from error
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise DataError(f"{name} in {root}: {error}") from error
    _check_kind(dataset, name)
    names = classes if classes is not None else _names(dataset)
    return read_examples(Images(dataset, name), reader, augment, names)


def _split(name: str, known: Any, split: str | None) -> dict[str, Any]:
    """Return the split in the form that the dataset takes."""
    if "split" in known and split is not None:
        return {"split": split}
    if "train" in known and "split" not in known:
        if split not in ("train", "test"):
            raise DataError(f"{name} has the splits 'train' and 'test', not {split!r}")
        return {"train": split == "train"}
    if split is not None:
        raise DataError(f"{name} is not divided: give split=None")
    return {}


def _check_kind(dataset: Any, name: str) -> None:
    if not len(dataset):
        raise DataError(f"{name} is empty")
    first = dataset[0]
    images = require("PIL.Image", "vision")
    fits = isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], images.Image)
    if not fits or not isinstance(first[1], int | str) or str(first[1]).isalpha():
        raise DataError(f"{name} is not a data set of images that belong to one class each")


def _names(dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes, or their numbers."""
    names = getattr(dataset, "classes", None)
    if names:  # those of ImageNet are tuples of synonyms
        return distinct(n if isinstance(n, str) else ", ".join(n) for n in names)
    labels = next(
        (
            v
            for k in ("targets", "labels", "_labels")
            if (v := getattr(dataset, k, None)) is not None
        ),
        None,
    )
    if labels is None:
        return None
    numbers = [int(label) for label in labels]
    if min(numbers) < 0:
        refuse(
            DataError,
            type(dataset).__name__,
            ["there are examples without a label: choose another split"],
        )
    return classes_of(map(str, range(max(numbers) + 1)))
