"""The networks of a file: their names, and which of a pipeline are meant."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gift.core.dynamic_class import plain_class

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Key of the settings of PEFT in the header."""
PEFT_TYPES = ("LORA", "LOKR")
"""What diffusers makes of its files."""

_NAMES = re.compile(
    r"(unet|transformer|text_encoder|text_conditioner|prior|controlnet|connectors)(_\d+|_ref)?"
)
_BY_CLASS = {"UNet": "unet", "Transformer": "transformer"}


def is_name(text: str) -> bool:
    """Whether pipelines have a network of that name."""
    return _NAMES.fullmatch(text) is not None


def name_of(net: nn.Module) -> str | None:
    """Return the name that pipelines have for a network of this class; None if it depends."""
    cls = plain_class(type(net)).__name__
    return next((name for mark, name in _BY_CLASS.items() if mark in cls), None)


def named_networks(net: Any) -> dict[str, nn.Module] | None:
    """Return the networks of a pipeline or of a dict by name; None if this is one network.

    Raises:
        TypeError: if it is nothing of these.
    """
    if isinstance(net, nn.Module):
        return None
    nets = net if isinstance(net, Mapping) else getattr(net, "components", None)
    if not isinstance(nets, Mapping):
        raise TypeError(
            "expected a network, several by their names in the pipeline, or a pipeline of "
            f"diffusers, got {type(net).__name__}"
        )
    if nets is not net:  # a pipeline, which has tokenizers and schedulers as well
        return {name: part for name, part in nets.items() if isinstance(part, nn.Module)}
    if wrong := {name: type(part).__name__ for name, part in nets.items()
                 if not isinstance(part, nn.Module)}:  # fmt: skip
        raise TypeError(f"expected networks by their names, got {wrong}")
    return dict(nets)


def file_in(path: str | os.PathLike[str]) -> Path:
    """Return the file that a path means: a folder has one of a fixed name."""
    path = Path(path).expanduser()
    return path / FILE_NAME if path.is_dir() or not path.suffix else path
