"""Readers of images from the transforms of libraries."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from gift.data.readers import PictureReader
from gift.errors import GiftWarning
from gift.support.optional import require

_TOLERANCE = 0.02
"""Mean difference for a range of about 1; a shift by whole pixels gives more."""


def reader_like(
    settings: dict[str, Any],
    transform: Callable[[Any], torch.Tensor],
    what: str,
    made: type[PictureReader] = PictureReader,
) -> PictureReader | None:
    """Return a reader with these settings if it matches the library's own transform, else None.

    Args:
        settings: settings of `PictureReader`.
        transform: converts an image to a tensor.
        what: name of the network, for the warning if the two differ.
        made: class of the reader.
    """
    try:
        reader = made(**settings)
        image = _image()
        own, its = reader(image), transform(image)
        if own.shape == its.shape and (own - its).abs().mean() < _TOLERANCE:
            return reader
        reason = f"it does what {made.__name__} cannot"
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error)
    warnings.warn(
        f"{what} reads images in a way of its own ({reason}): give load_network(..., reader=...)",
        GiftWarning,
        stacklevel=5,
    )
    return None


def _image() -> Any:
    """Create an image like a photograph: smooth, wider than high, the same each time."""
    noise = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    f = require("torchvision.transforms.v2.functional", "vision")
    return f.to_pil_image(f.resize(noise, [450, 600], antialias=True))
