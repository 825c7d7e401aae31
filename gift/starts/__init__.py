"""Starts of LoRA that look at data."""

from gift.starts.initialise import Initialised, initialise

__all__ = ["Initialised", "initialise"]
