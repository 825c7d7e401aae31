"""Starts of LoRA that look at data, or at what quantising lost."""

from gift.starts.initialise import Initialised, initialise
from gift.starts.loftq import loftq

__all__ = ["Initialised", "initialise", "loftq"]
