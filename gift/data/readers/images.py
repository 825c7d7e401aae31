"""Readers of images."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.errors import DataError
from gift.support.optional import require

Size = int | tuple[int, int]
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class PictureReader:
    """Converts images to tensors for networks of torchvision, timm and transformers.

    Images, or image files, are rotated according to their EXIF data, resized, center-cropped and
    normalized. Grayscale images become RGB, or all images become grayscale if there is only one
    `mean`.

    Args:
        size: height and width of the tensors.
        resize: size before the center crop: the shorter side, or height and width. None is `size`:
            the shorter side if it is a square, else both sides.
        mean, std: normalization of each channel, for values from 0 to 1.
        interpolation: "bilinear", "bicubic", or another mode of torchvision.
        scale: lower and upper bound of the area of random crops for training, as shares of the
            image.
        flip: whether to flip images horizontally at random for training; not for digits.

    Raises:
        ValueError: naming all settings that are out of range.

    Example:
        >>> from PIL import Image
        >>> from gift.data import PictureReader
        >>> reader = PictureReader(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> tensor = reader(Image.new("L", (100, 50), "white"))
        >>> tensor.shape, tensor.unique()
        (torch.Size([3, 32, 32]), tensor([1.]))
        >>> reader("a.jpg")
        Traceback (most recent call last):
        gift.errors.DataError: a.jpg cannot be read as an image: there is no such file
    """

    kind: ClassVar[str] = "picture"
    stands_alone: ClassVar[bool] = True

    size: Size = 224
    resize: Size | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        for name in ("size", "resize", "mean", "std", "scale"):  # lists, if they come from a file
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if not _is_size(self.size) or not (self.resize is None or _is_size(self.resize)):
            raise ValueError(
                f"size is {self.size!r} and resize is {self.resize!r}, expected a whole number of "
                "at least 1, or two: height and width"
            )
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        channels = (len(self.mean), len(self.std))
        checks = {
            f"resize is {self.resize}, expected at least {self.size}": self._is_enough(),
            f"mean and std have {channels} values, expected 3 of each, or 1 for grey images":
                channels in ((3, 3), (1, 1)),
            f"std is {self.std}, expected more than 0": all(value > 0 for value in self.std),
            f"interpolation is {self.interpolation!r}, expected one of {INTERPOLATIONS}":
                self.interpolation in INTERPOLATIONS,
            f"scale is {self.scale}, expected two shares from 0 to 1":
                len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1,
        }  # fmt: skip
        if problems := [problem for problem, fits in checks.items() if not fits]:
            raise ValueError("; ".join(problems))

    def _is_enough(self) -> bool:
        sides = self._scaled()
        return all(side >= own for side, own in zip(sides * 2, self._size, strict=False))

    @property
    def _size(self) -> tuple[int, int]:
        return self.size  # type: ignore[return-value]  # made so above

    def _scaled(self) -> list[int]:
        """Return what torchvision calls the size: the shorter side, or both."""
        if self.resize is None:
            height, width = self._size
            return [height] if height == width else [height, width]
        return [self.resize] if isinstance(self.resize, int) else list(self.resize)

    def __call__(self, raw: Any) -> Tensor:
        """Convert an image or image file to a tensor, without random augmentation.

        Raises:
            DataError: if it cannot be read.
        """
        f = _functional()
        image = self._opened(raw)
        _refuse_thin(image.size, self._scaled(), raw)
        scaled = f.resize(image, self._scaled(), self._mode(), antialias=True)
        return self._normalised(f.center_crop(scaled, list(self._size)))

    def augmented(self, raw: Any) -> Tensor:
        """Convert a random crop of the image, flipped with a probability of 0.5."""
        transforms = require("torchvision.transforms.v2", "vision")
        image = transforms.RandomResizedCrop(
            self._size, scale=self.scale, interpolation=self._mode(), antialias=True
        )(self._opened(raw))
        if self.flip and torch.rand(()) < 0.5:
            image = _functional().horizontal_flip(image)
        return self._normalised(image)

    def collate(self, items: Sequence[Tensor]) -> Tensor:
        """Stack the tensors."""
        return torch.stack(list(items))

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`."""
        fields = dataclasses.asdict(self).items()
        return {"kind": self.kind} | {k: list(v) if type(v) is tuple else v for k, v in fields}

    def _opened(self, raw: Any) -> Any:
        return opened(raw, "RGB" if len(self.mean) == 3 else "L")

    def _mode(self) -> Any:
        return require("torchvision.transforms.v2", "vision").InterpolationMode(self.interpolation)

    def _normalised(self, image: Any) -> Tensor:
        return _functional().normalize(as_tensor(image), list(self.mean), list(self.std))


@dataclass(frozen=True)
class DetectorReader:
    """Converts images to tensors for torchvision's detectors, uncropped, values from 0 to 1.

    A batch is a list, because images differ in size. Random augmentation is left to the examples,
    because it changes the boxes too.
    """

    kind: ClassVar[str] = "detector"
    stands_alone: ClassVar[bool] = True

    def __call__(self, raw: Any) -> Tensor:
        """Convert an image or image file to a tensor.

        Raises:
            DataError: if it cannot be read.
        """
        return as_tensor(opened(raw, "RGB"))

    def augmented(self, raw: Any) -> Tensor:
        """Convert an image in the same way, without augmentation."""
        return self(raw)

    def collate(self, items: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors as a list."""
        return list(items)

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`."""
        return {"kind": self.kind}


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Accepted image formats, whatever the file name; for others, PIL would start programs."""
LARGEST_IMAGE = 1024**3 // 4 // 3
"""Maximum number of pixels of an image, in a file or after resizing; PIL warns above it."""


def _too_large(image: Any) -> str:
    """Say what is wrong with the size in the header of a file, before pixels are decoded."""
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        return f"it has {width:,} x {height:,} pixels, expected at most {LARGEST_IMAGE:,}"
    return ""


def _refuse_thin(size: tuple[int, int], scaled: Sequence[int], raw: Any) -> None:
    """Refuse an image that would exceed the maximum size once its shorter side is resized."""
    shorter, longer = sorted(size)
    if len(scaled) == 1 and shorter and scaled[0] ** 2 * longer > LARGEST_IMAGE * shorter:
        raise DataError(
            f"{_shown(raw)} has {size[0]:,} x {size[1]:,} pixels: with a shorter side of "
            f"{scaled[0]} it would have more than {LARGEST_IMAGE:,}; resize=(height, width) "
            "scales both sides"
        )


def _shown(raw: Any) -> str:
    return str(raw) if isinstance(raw, str | Path) else "the image"


def opened(raw: Any, mode: str | None) -> Any:
    """Open a PIL image or an image file in a PIL mode; None keeps its own, and its values.

    Raises:
        DataError: if it cannot be read.
    """
    images, ops = require("PIL.Image", "vision"), require("PIL.ImageOps", "vision")
    if not isinstance(raw, images.Image):
        if not isinstance(raw, str | Path):
            raise DataError(f"expected an image of PIL or the path of one, got {_described(raw)}")
        try:
            images.init()  # PIL registers all formats only then
            with images.open(raw, formats=[f for f in FORMATS if f in images.OPEN]) as file:
                if reason := _too_large(file):
                    raise DataError(reason)
                return opened(file, mode)
        except FileNotFoundError:
            reason = "there is no such file"
        except (images.UnidentifiedImageError, ImportError):
            # ultralytics replaces PIL's function by one that then asks for a package of its own.
            reason = f"it is none of the formats {', '.join(FORMATS)}, or damaged"
        except Exception as error:  # a damaged file can make a decoder raise anything
            reason = str(error) or type(error).__name__
        raise DataError(f"{raw} cannot be read as an image: {reason}")
    image = ops.exif_transpose(raw)
    if mode is None:
        image.load()  # before its file is closed
        return image
    if image.mode.startswith("I;16"):  # PIL would clip values above 255
        image = images.fromarray((require("numpy", "vision").asarray(image) >> 8).astype("u1"))
    elif image.mode in ("I", "F"):
        raise DataError("its values have 32 bits, whose range is not known: save it with 8 or 16")
    return image.convert(mode)


def as_tensor(image: Any) -> Tensor:
    """Convert a PIL image to a tensor (channels, height, width) with values from 0 to 1."""
    return _functional().pil_to_tensor(image).to(torch.float32) / 255


def _functional() -> Any:
    return require("torchvision.transforms.v2.functional", "vision")


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(type(side) is int and side >= 1 for side in sides)


def _described(value: Any) -> str:
    return (
        f"{value!r:.60}" if isinstance(value, int | float | None) else f"a {type(value).__name__}"
    )
