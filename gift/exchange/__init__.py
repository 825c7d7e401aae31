"""Deltas in the file formats of others."""

from gift.exchange.kohya import load_kohya, save_kohya
from gift.exchange.peft_loading import load_peft
from gift.exchange.peft_saving import save_peft

__all__ = ["load_kohya", "load_peft", "save_kohya", "save_peft"]
