"""Readers of pictures from what libraries know of their weights."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from gift.data.readers import PictureReader
from gift.errors import GiftWarning
from gift.support.optional import require

_TOLERANCE = 0.02
"""Mean difference, where about 1 is the range; whole pixels of another place differ by more."""


def reader_like(
    settings: dict[str, Any], transform: Callable[[Any], torch.Tensor], what: str
) -> PictureReader | None:
    """A reader with these settings if it does what a library's own transform does, else None.

    Args:
        settings: of `PictureReader`.
        transform: makes a tensor of a picture.
        what: the network, for the warning that is given where they differ.
    """
    try:
        reader = PictureReader(**settings)
        picture = _picture()
        own, its = reader(picture), transform(picture)
        if own.shape == its.shape and (own - its).abs().mean() < _TOLERANCE:
            return reader
        reason = "it does what PictureReader cannot"
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error)
    warnings.warn(
        f"{what} reads pictures in a way of its own ({reason}): give load_network(..., reader=...)",
        GiftWarning,
        stacklevel=5,
    )
    return None


def _picture() -> Any:
    """A photograph as it were: smooth, wider than high, the same each time."""
    noise = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    f = require("torchvision.transforms.v2.functional", "vision")
    return f.to_pil_image(f.resize(noise, [450, 600], antialias=True))
