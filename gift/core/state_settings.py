"""The settings of a delta as a tensor, so that they survive in a plain dictionary of tensors.

``state_dict()._metadata`` is lost in ``{k: v.cpu() for ...}``, in safetensors files and in every
copy of a state. Settings that the shapes of a delta do not show (another ``lora_alpha``, for
example) are therefore also entries of the state, one for each module with such settings. The key is
the module's path followed by `KEY`. The value holds the bytes of a JSON text as float32 numbers.
These are exact in every floating-point dtype that deltas have, and code that averages states can
average them.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "gift_settings"


def encoded(settings: Mapping[str, Any], device: torch.device | None = None) -> Tensor:
    """Encode settings as a tensor.

    Args:
        settings: plain data.
        device: of the tensor.

    Returns:
        A float32 vector, one number for each byte of the text.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return torch.tensor(list(text.encode()), dtype=torch.float32, device=device)


def decoded(tensor: Any) -> dict[str, Any] | None:
    """The settings that `encoded` wrote, or None if the tensor contains none."""
    try:
        text = bytes(int(number) for number in tensor.detach().float().cpu().round().tolist())
        settings = json.loads(text)
    except (AttributeError, RuntimeError, TypeError, ValueError, OverflowError, RecursionError):
        return None  # not written by `encoded`, or damaged
    return settings if isinstance(settings, dict) else None


def without_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without the entries that hold settings."""
    return {name: value for name, value in state.items() if not is_settings(name)}


def is_settings(name: str) -> bool:
    """Whether the entry of that name in a state holds settings."""
    return name.rpartition(".")[2] == KEY
