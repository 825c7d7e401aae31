"""Names of the layers of CLIP text encoders, which versions of transformers give differently.

Files have ``text_model.encoder...``, but newer versions of transformers have removed that module
from `CLIPTextModel`.
"""

from torch import nn

from gift.core.dynamic_class import plain_class

_MODULE = "text_model"


def lead(net: nn.Module, separator: str) -> str:
    """Return what files have before the paths of a network's layers; empty for most networks."""
    is_without = is_text_encoder(net) and not hasattr(net, _MODULE)
    return _MODULE + separator if is_without else ""


def elsewhere(net: nn.Module, path: str, separator: str) -> str:
    """Return the path that a layer of this network has in other versions of transformers."""
    text = _MODULE + separator
    if not is_text_encoder(net):
        return path
    return path.removeprefix(text) if path.startswith(text) else text + path


def in_all_versions(net: nn.Module, pattern: str) -> str:
    """Return a pattern for one layer of this network that fits in all versions."""
    if not is_text_encoder(net):
        return pattern
    return rf"^({_MODULE}\.)?" + pattern.removeprefix("^").removeprefix(rf"{_MODULE}\.")


def is_text_encoder(net: nn.Module) -> bool:
    """Whether the names of a network's layers depend on the version of transformers."""
    return plain_class(type(net)).__name__ == "CLIPTextModel"
