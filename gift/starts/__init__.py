"""Starts of LoRA that look at data, or at what quantising lost, and ranks that do."""

from gift.starts.allocating import allocate
from gift.starts.initialise import initialise
from gift.starts.loftq import loftq
from gift.starts.places import Initialised

__all__ = ["Initialised", "allocate", "initialise", "loftq"]
