"""Training images: scikit-learn's handwritten digits, or a folder of class folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gift.demo.network import Data
from gift.support.optional import require

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
HELD_OUT = ("val", "valid", "validation", "test")
LIMITS = {"train": 2000, "test": 300}  # maximum number of images, so that the demo stays short


class BadFolderError(ValueError):
    """The demo cannot learn from the content of a folder."""


@dataclass
class Task:
    """Classes to distinguish.

    Args:
        names: names of the classes.
        train: training images.
        test: held-out images.
    """

    names: list[str]
    train: Data
    test: Data

    def only(self, classes: Sequence[int]) -> "Task":
        """Return the task with some of the classes."""
        parts = []
        for data in (self.train, self.test):
            kept = torch.isin(data.labels, torch.tensor(classes))
            labels = torch.tensor([classes.index(label) for label in data.labels[kept].tolist()])
            parts.append(Data(data.images[kept], labels))
        return Task([self.names[c] for c in classes], *parts)

    def rotated(self) -> "Task":
        """Return the task of telling how far each image was rotated, which needs no classes."""
        parts = []
        for data in (self.train, self.test):
            turned = [data.images.rot90(turns, (2, 3)) for turns in range(4)]
            parts.append(Data(torch.cat(turned), torch.arange(4).repeat_interleave(len(data))))
        return Task([f"{90 * turns} degrees" for turns in range(4)], *parts)


def digits() -> Task:
    """Load 1,797 scans of handwritten digits, 8 x 8 pixels; a third of them is held out."""
    scans = require("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(scans.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(scans.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 3])
    parts = [Data(images[part], labels[part]) for part in (train, test)]
    return Task([str(digit) for digit in range(10)], *parts)


def read_folder(folder: Path, size: int) -> Task:
    """Read the images in ``folder/CLASS/`` or in ``folder/train/CLASS/`` and ``folder/val/CLASS/``.

    Args:
        folder: the folder; without ``train`` and ``val``, every fourth image is held out.
        size: side of the images in pixels, after cropping to squares and resizing.

    Raises:
        BadFolderError: if it does not contain at least two classes of images.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise BadFolderError(f"{folder} {what}")
    held_out = [folder / name for name in HELD_OUT if (folder / name).is_dir()]
    if (folder / "train").is_dir() and held_out:
        train, test = _classes(folder / "train"), _classes(held_out[0])
        if train.keys() != test.keys():
            different = sorted(train.keys() ^ test.keys())
            raise BadFolderError(
                f"{folder}: the classes {different} are in only one of train and {held_out[0].name}"
            )
    else:
        both = _classes(folder / "train" if (folder / "train").is_dir() else folder)
        alone = [name for name, files in both.items() if len(files) < 2]
        if alone:
            raise BadFolderError(f"{folder}: the classes {alone} have fewer than two images")
        test = {name: files[::4] for name, files in both.items()}
        train = {name: sorted({*files} - {*files[::4]}) for name, files in both.items()}
    names = list(train)
    return Task(
        names,
        _read(list(train.values()), size, LIMITS["train"]),
        _read(list(test.values()), size, LIMITS["test"]),
    )


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class folder that has any."""
    found = {
        place.name: sorted(f for f in place.iterdir() if f.suffix.lower() in SUFFIXES)
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2:
        raise BadFolderError(
            f"{folder} has images of these classes: {list(found)}, expected at least two, such "
            "as cats/1.jpg and dogs/1.jpg, or train and val with these"
        )
    return found


def _read(classes: list[list[Path]], size: int, limit: int) -> Data:
    """Read at most `limit` images, the same number from each class."""
    share = max(1, limit // len(classes))
    images, labels = [], []
    for label, files in enumerate(classes):
        number = min(share, len(files))
        chosen = [files[i * len(files) // number] for i in range(number)]
        images += [_image(file, size) for file in chosen]
        labels += [label] * number
    return Data(torch.stack(images), torch.tensor(labels))


MEAN = torch.tensor((0.485, 0.456, 0.406)).reshape(3, 1, 1)  # as pretrained weights expect
STD = torch.tensor((0.229, 0.224, 0.225)).reshape(3, 1, 1)


def _image(file: Path, size: int) -> Tensor:
    images, numpy = require("PIL.Image", "demo"), require("numpy", "demo")
    try:
        with images.open(file) as image:
            square = require("PIL.ImageOps", "demo").fit(image.convert("RGB"), (size, size))
    except (OSError, ImportError) as error:  # the latter from ultralytics, which replaces `open`
        raise BadFolderError(f"{file} cannot be read as an image: {error}") from error
    return (torch.from_numpy(numpy.array(square)).permute(2, 0, 1) / 255 - MEAN) / STD


def visible(image: Tensor) -> Tensor:
    """Convert an image of `read_folder` to (height, width, 3) in [0, 1]."""
    return (image * STD + MEAN).clamp(0, 1).permute(1, 2, 0)
