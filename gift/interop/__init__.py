"""Deltas in the file formats of other libraries, one folder for each library."""

from gift.interop.diffusers import load_diffusers, save_diffusers
from gift.interop.kohya import load_kohya, save_kohya
from gift.interop.peft.loading import load_peft
from gift.interop.peft.saving import save_peft

__all__ = [
    "load_diffusers",
    "load_kohya",
    "load_peft",
    "save_diffusers",
    "save_kohya",
    "save_peft",
]
