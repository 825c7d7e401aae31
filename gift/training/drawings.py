"""Drawings of what a network says of images: masks and boxes over them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift.errors import TrainingError
from gift.support.atomic_files import write_bytes
from gift.support.optional import require

LARGEST_SIDE = 400
"""Longer side of an image in a report, in pixels."""


class Sample(NamedTuple):
    """An example and what the network says of it, for the report.

    Args:
        caption: what it shows, in words.
        png: the image as PNG.
    """

    caption: str
    png: bytes


def over(image: Tensor, mask: Tensor, colours: Sequence[Sequence[int]], opacity: float) -> Tensor:
    """Return an image (3, height, width) of bytes with the colours of classes over it.

    A class whose colour is black, by custom the background, leaves the image as it is.

    Args:
        image: bytes (3, height, width).
        mask: class numbers (height, width); others than those of the colours are left out.
        colours: red, green and blue of each class.
        opacity: opacity of the colours, from 0 to 1.
    """
    draw = require("torchvision.utils", "vision").draw_segmentation_masks
    shown = [n for n, colour in enumerate(colours) if any(colour) and bool((mask == n).any())]
    if not shown:
        return image
    masks = torch.stack([mask == number for number in shown])
    drawn: Tensor = draw(image, masks, opacity, [tuple(colours[number]) for number in shown])
    return drawn


def boxed(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> Tensor:
    """Return an image (3, height, width) of bytes with boxes and their labels.

    Args:
        image: bytes (3, height, width).
        boxes: left, top, right and bottom of each box (boxes, 4).
        labels: text at each box.
        colours: colour of each box.
    """
    if not len(boxes):
        return image
    draw = require("torchvision.utils", "vision").draw_bounding_boxes
    width = max(1, round(max(image.shape) / 200))
    drawn: Tensor = draw(image, boxes, list(labels), list(colours), width=width)
    return drawn


_TINTS = ((31, 111, 180), (212, 97, 11), (44, 138, 87), (138, 79, 176), (190, 30, 45))


def tints(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return a colour for each class number."""
    return [_TINTS[number % len(_TINTS)] for number in labels]


def bytes_of(image: Tensor, mean: Sequence[float] = (0,), std: Sequence[float] = (1,)) -> Tensor:
    """Return a normalised image (channels, height, width) as bytes (3, height, width)."""
    image = image.detach().cpu().float()
    plain = image * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    found = (plain.clamp(0, 1) * 255).round().to(torch.uint8)
    return found.expand(3, -1, -1) if len(found) == 1 else found[:3]


def png(images: Sequence[Tensor]) -> bytes:
    """Return images of bytes (3, height, width) side by side as PNG, scaled down if they are large.

    Args:
        images: images of the same size.
    """
    f = require("torchvision.transforms.v2.functional", "vision")
    gap = torch.full((3, images[0].shape[1], 4), 255, dtype=torch.uint8)
    parts = [part for image in images for part in (image, gap)][:-1]
    whole: Any = f.to_pil_image(torch.cat(parts, 2))
    scale = LARGEST_SIDE * len(images) / max(LARGEST_SIDE * len(images), whole.width)
    scale = min(scale, LARGEST_SIDE / max(LARGEST_SIDE, whole.height))
    if scale < 1:
        size = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
        whole = whole.resize(size)
    out = io.BytesIO()
    whole.save(out, format="PNG")
    return out.getvalue()


def write_drawings(predictions: Sequence[Any], folder: str | Path) -> list[Path]:
    """Write masks, and images with masks or boxes, as PNG files named like the images.

    Args:
        predictions: what `gift.training.predict` returned.
        folder: output folder; it is created if necessary. A mask is ``NAME.png``, the image with
            it ``NAME_overlay.png``, one with boxes ``NAME.png``.

    Returns:
        Paths of the files.

    Raises:
        TrainingError: if there is nothing to draw: the predictions are neither masks nor boxes.
    """
    found: list[Path] = []
    for number, one in enumerate(predictions):
        named = isinstance(one.input, str | Path)
        stem = f"{number:04d}_{Path(one.input).stem}" if named else f"{number:04d}"
        images = {}
        if hasattr(one, "overlay"):
            images[f"{stem}.png"] = one.image()
            if not isinstance(one.input, Tensor):
                images[f"{stem}_overlay.png"] = one.overlay()
        elif hasattr(one, "drawn"):
            images[f"{stem}.png"] = one.drawn()
        else:
            raise TrainingError(f"{type(one).__name__} is nothing to draw, unlike masks and boxes")
        for name, image in images.items():
            out = io.BytesIO()
            image.save(out, format="PNG")
            Path(folder).mkdir(parents=True, exist_ok=True)
            found.append(Path(folder) / name)
            write_bytes(found[-1], out.getvalue())
    return found
