"""Methods: one file each. `METHODS` maps a method's name to its class."""

from gift.methods.base import METHODS, AdaptationError, Method, method_of, register_method
from gift.methods.dora import DoRA
from gift.methods.ia3 import IA3
from gift.methods.lora import LoRA, RsLoRA
from gift.methods.svdiff import SVDiff

__all__ = [
    "IA3",
    "METHODS",
    "AdaptationError",
    "DoRA",
    "LoRA",
    "Method",
    "RsLoRA",
    "SVDiff",
    "method_of",
    "register_method",
]
