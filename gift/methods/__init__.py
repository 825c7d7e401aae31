"""Methods: one file each. `METHODS` maps a method's name to its class."""

from gift.methods.base import METHODS, AdaptationError, Method, method_of, register_method
from gift.methods.lora import LoRA

__all__ = ["METHODS", "AdaptationError", "LoRA", "Method", "method_of", "register_method"]
