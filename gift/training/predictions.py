"""Predictions: what a network returns for an input, as one class for each task."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift.data.readers.images import opened
from gift.support.atomic_files import write_bytes
from gift.support.optional import require
from gift.training.drawings import boxed, over, tints


class Options(NamedTuple):
    """Options of `gift.training.predict` that depend on the task.

    Args:
        top: number of classes, or of objects, to show; None shows one class, and all objects.
        threshold: lowest score of an object, or probability of a class among several; None is 0
            for objects and 0.5 for classes.
        max_new_tokens: largest number of tokens to write.
    """

    top: int | None = None
    threshold: float | None = None
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Prediction:
    """The predicted class of an input.

    Args:
        input: the input.
        label: name of the most probable class, or its number if names are not known.
        probability: probability of that class.
        probabilities: probabilities of all classes.
        top: number of classes to show.
    """

    input: Any
    label: str | int
    probability: float
    probabilities: dict[str | int, float] = field(repr=False)
    top: int = 1

    def best(self, number: int | None = None) -> list[tuple[str | int, float]]:
        """Return the most probable classes in descending order; None returns `top` of them."""
        ordered = sorted(self.probabilities.items(), key=lambda item: -item[1])
        return ordered[: self.top if number is None else number]

    def __str__(self) -> str:
        return f"{shown(self.input)}: " + ", ".join(f"{name} {p:.1%}" for name, p in self.best())


@dataclass(frozen=True)
class Detected:
    """The objects detected in an image, in descending order of their scores.

    Args:
        input: the input.
        boxes: left, top, right and bottom of each object.
        labels: name of the class of each object, or its number if names are not known.
        scores: confidence of each detection.
    """

    input: Any
    boxes: list[list[float]]
    labels: list[str | int]
    scores: list[float]

    def drawn(self) -> Any:
        """Return the input image with the boxes, as a PIL image."""
        f = require("torchvision.transforms.v2.functional", "vision")
        image = f.pil_to_tensor(opened(self.input, "RGB"))
        numbers = {label: number for number, label in enumerate(dict.fromkeys(self.labels))}
        texts = [f"{n} {s:.0%}" for n, s in zip(self.labels, self.scores, strict=True)]
        colours = tints([numbers[label] for label in self.labels])
        return f.to_pil_image(boxed(image, torch.tensor(self.boxes), texts, colours))

    def __str__(self) -> str:
        lines = [
            f"  {label} {score:.1%} at {', '.join(f'{side:.0f}' for side in box)}"
            for box, label, score in zip(self.boxes, self.labels, self.scores, strict=True)
        ]
        return "\n".join([f"{shown(self.input)}:", *(lines or ["  nothing"])])


@dataclass(frozen=True)
class Number:
    """The predicted number of an input, or several.

    Args:
        input: the input.
        value: the number, in the units of the training examples.
    """

    input: Any
    value: float | list[float]

    def __str__(self) -> str:
        values = self.value if isinstance(self.value, list) else [self.value]
        return f"{shown(self.input)}: {', '.join(f'{value:.6g}' for value in values)}"


@dataclass(frozen=True)
class Labels:
    """The classes of an input, which may be none or several.

    Args:
        input: the input.
        labels: names of the classes, or their numbers if names are not known, in descending order
            of their probabilities.
        probabilities: probability of each class, independent of the others.
    """

    input: Any
    labels: list[str | int]
    probabilities: dict[str | int, float] = field(repr=False)

    def __str__(self) -> str:
        found = [f"{name} {self.probabilities[name]:.1%}" for name in self.labels]
        return f"{shown(self.input)}: {', '.join(found) or 'none'}"


@dataclass(frozen=True, eq=False)
class Segmented:
    """The predicted class of each pixel of an image.

    Args:
        input: the input.
        mask: class numbers (height, width), at the resolution of the image.
        classes: names of the classes, or their numbers as texts.
        colours: red, green and blue of each class.
    """

    input: Any
    mask: Tensor = field(repr=False)
    classes: tuple[str, ...]
    colours: list[list[int]] = field(repr=False)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that is there."""
        counts = torch.bincount(self.mask.flatten().long(), minlength=len(self.classes)).tolist()
        total = max(self.mask.numel(), 1)
        return {n: c / total for n, c in zip(self.classes, counts, strict=True) if c}

    def image(self) -> Any:
        """Return the mask as a PIL image: class numbers, with the colours as palette.

        Raises:
            ValueError: if there are more than 256 classes.
        """
        if len(self.classes) > 256:
            raise ValueError(f"there are {len(self.classes)} classes, an image holds 256")
        image = require("PIL.Image", "vision").fromarray(self.mask.to(torch.uint8).numpy())
        image.putpalette([value for colour in self.colours for value in colour])
        return image

    def overlay(self, opacity: float = 0.5) -> Any:
        """Return the input image with the colours of the classes over it, as a PIL image.

        A class whose colour is black, by custom the background, leaves the image as it is.

        Args:
            opacity: opacity of the colours, from 0 to 1.
        """
        f = require("torchvision.transforms.v2.functional", "vision")
        image = f.pil_to_tensor(opened(self.input, "RGB"))
        return f.to_pil_image(over(image, self.mask, self.colours, opacity))

    def save(self, path: str | Path) -> None:
        """Write the mask as PNG, whose pixels are class numbers."""
        out = io.BytesIO()
        self.image().save(out, format="PNG")
        write_bytes(path, out.getvalue())

    def __str__(self) -> str:
        parts = sorted(self.shares.items(), key=lambda item: -item[1])
        return f"{shown(self.input)}: " + ", ".join(f"{name} {part:.1%}" for name, part in parts)


@dataclass(frozen=True)
class Written:
    """The text that a language model writes after a prompt.

    Args:
        input: the prompt: a text, messages, or a record with them.
        text: what was written.
    """

    input: Any
    text: str

    def __str__(self) -> str:
        return f"{shown(self.input)}: {self.text}"


@dataclass(frozen=True, eq=False)
class Embedded:
    """The vector of an input, of length 1.

    Args:
        input: the input.
        vector: the vector (size,).
    """

    input: Any
    vector: Tensor = field(repr=False)

    def __str__(self) -> str:
        first = ", ".join(f"{value:.3g}" for value in self.vector[:4].tolist())
        return f"{shown(self.input)}: {first}, ... ({len(self.vector)} numbers)"


def size_of(item: Any) -> tuple[int, int] | None:
    """Return height and width of an image or image file; None for tensors."""
    if isinstance(item, Tensor):
        return None
    width, height = opened(item, "L").size  # turned as its EXIF data say
    return height, width


def shown(value: Any) -> str:
    """Describe an input in a few words."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    text = str(value) if isinstance(value, str | Path | tuple) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
