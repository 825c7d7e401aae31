"""Readers of images for segmentation, and of their masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.data.examples import IGNORED
from gift.data.readers.images import PictureReader, opened
from gift.errors import DataError, some
from gift.support.optional import require


@dataclass(frozen=True)
class SegmentationReader(PictureReader):
    """Converts images to tensors for segmentation networks: resized to `size`, without a crop.

    Args:
        size: height and width of the tensors.
        resize: must be None, since nothing is cropped.
        mean, std: normalization of each channel, for values from 0 to 1.
        interpolation: "bilinear", "bicubic", or another mode of torchvision, for images.
        scale: lower and upper bound of the area of random crops for training, as shares of the
            image.
        flip: whether to flip images and masks horizontally at random for training.

    Raises:
        ValueError: naming all settings that are out of range.
    """

    kind: ClassVar[str] = "segmentation"

    size: int | tuple[int, int] = 512
    scale: tuple[float, float] = (0.25, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None:
            raise ValueError(f"resize is {self.resize}, expected None: nothing is cropped")

    def _scaled(self) -> list[int]:
        return list(self._size)

    def pair(self, image: Any, mask: Tensor, augment: bool = False) -> tuple[Tensor, Tensor]:
        """Convert an image and its mask, by the same crop and flip.

        Args:
            image: image or image file.
            mask: class numbers (height, width), of the size of the image.
            augment: whether to crop and flip at random.

        Returns:
            Image (channels, height, width) and class numbers (height, width), both of `size`.
        """
        f = require("torchvision.transforms.v2.functional", "vision")
        size, picture = list(self._size), self._opened(image)
        top, left, height, width = 0, 0, *mask.shape
        if augment:
            crop = require("torchvision.transforms", "vision").RandomResizedCrop
            ratio = (3 / 4, 4 / 3)
            top, left, height, width = crop.get_params(picture, list(self.scale), list(ratio))
        box = (top, left, height, width, size)
        # What torchvision does to a Mask, "nearest", takes pixels half a pixel too far to the left.
        exact = require("torchvision.transforms.v2", "vision").InterpolationMode.NEAREST_EXACT
        pair = [
            f.resized_crop(picture, *box, interpolation=self._mode(), antialias=True),
            f.resized_crop(mask[None], *box, interpolation=exact),
        ]
        if augment and self.flip and torch.rand(()) < 0.5:
            pair = [f.horizontal_flip(one) for one in pair]
        return self._normalised(pair[0]), pair[1][0]


@dataclass(frozen=True)
class MaskFormat:
    """How the classes of pixels are written in an image.

    Args:
        values: the value of each class in an image of one channel; None if it is the class number.
        colours: the colour of each class in an image of three channels.
        ignore: values that belong to no class.
        number: number of classes; None if it is not known.
    """

    values: tuple[int, ...] | None = None
    colours: tuple[tuple[int, int, int], ...] | None = None
    ignore: tuple[int, ...] = (255,)
    number: int | None = None

    def read(self, path: str | Path) -> Tensor:
        """Return class numbers (height, width), with `IGNORED` where there is none.

        Raises:
            DataError: if it cannot be read, or has values that are not classes.
        """
        pixels = self.pixels(path)
        if pixels.dim() == 3:
            return self._of_colours(pixels, path)
        found = torch.full_like(pixels, IGNORED)
        for number, value in enumerate(self.values or ()):
            found[pixels == value] = number
        if self.values is None:
            known = pixels if self.number is None else pixels.where(pixels < self.number, IGNORED)
            found = known.clone()
        for value in self.ignore:
            found[pixels == value] = IGNORED
        odd = pixels[(found == IGNORED) & ~torch.isin(pixels, torch.tensor(self.ignore).long())]
        if len(odd):
            expected = list(self.values or range(self.number or 0))
            raise DataError(
                f"{path} has pixels of {some([str(v) for v in odd.unique().tolist()])}, expected "
                f"{some([str(v) for v in expected], 12)}, or {list(self.ignore)}, which is ignored"
            )
        return found

    def pixels(self, path: str | Path) -> Tensor:
        """Return the values of an image, or its colours if there are some to tell apart."""
        numpy = require("numpy", "vision")
        image = open_mask(path)
        if self.colours is not None:
            return torch.from_numpy(numpy.array(image.convert("RGB"))).long()
        if image.mode not in ("L", "P", "1", "I;16", "I"):
            raise DataError(
                f"{path} has colours ({image.mode}), expected one number for each pixel: say which "
                "colour is which class, colours=[[128, 0, 0], ...]"
            )
        return torch.from_numpy(numpy.array(image).astype("int64"))

    def _of_colours(self, pixels: Tensor, path: str | Path) -> Tensor:
        codes = (pixels * torch.tensor([65536, 256, 1])).sum(-1)
        found = torch.full_like(codes, IGNORED)
        known = torch.zeros_like(codes, dtype=torch.bool)
        for number, (red, green, blue) in enumerate(self.colours or ()):
            same = codes == red * 65536 + green * 256 + blue
            found[same], known = number, known | same
        for value in self.ignore:  # by custom, a grey or white frame
            known |= codes == value * 65793
        if not bool(known.all()):
            odd = pixels[~known].unique(dim=0)[:5].tolist()
            raise DataError(
                f"{path} has pixels of {some([str(colour) for colour in odd])}, which are none of "
                f"the {len(self.colours or ())} colours"
            )
        return found


def open_mask(path: str | Path) -> Any:
    """Open an image as it is, without converting its values.

    Raises:
        DataError: if it cannot be read.
    """
    return opened(path, None)


def colours_of(number: int) -> list[list[int]]:
    """Return a colour for each class, those of Pascal VOC: black, dark red, dark green, ...

    Example:
        >>> colours_of(3)
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    found = []
    for place in range(number):
        colour, rest = [0, 0, 0], place
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        found.append(colour)
    return found


def checked_colours(given: Any, number: int | None = None) -> list[list[int]]:
    """Return colours as lists of three numbers.

    Raises:
        DataError: naming all that are not, or if there are not as many as classes.
    """
    problems = []
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"colours are {given!r:.60}, expected a list of [red, green, blue]")
    for place, colour in enumerate(given):
        fits = isinstance(colour, Sequence) and not isinstance(colour, str) and len(colour) == 3
        if not fits or not all(type(value) is int and 0 <= value <= 255 for value in colour):
            problems.append(f"colour {place} is {colour!r:.40}, expected three numbers to 255")
    if not problems and len({tuple(colour) for colour in given}) < len(given):
        problems.append("two classes have the same colour")
    if number is not None and len(given) != number:
        problems.append(f"there are {len(given)} colours for {number} classes")
    if problems:
        raise DataError("; ".join(problems))
    return [list(colour) for colour in given]
