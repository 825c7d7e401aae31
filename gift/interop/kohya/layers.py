"""The layers for which kohya files can hold a delta."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.layers.table import row_of


class Incompatible(ValueError):
    """A delta cannot be converted between a kohya file and gift; the error has all reasons."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Target:
    """The layer that a delta is for.

    Args:
        module: a linear layer or a convolution.
        weight: its frozen weight, ``(outputs, inputs / groups, *kernel)``.
    """

    module: Any
    weight: Tensor

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear layer."""
        return getattr(self.module, "groups", 1)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size of a convolution; empty for a linear layer."""
        return tuple(self.weight.shape[2:])

    @property
    def columns(self) -> int:
        """The columns of the matrix: inputs times kernel."""
        return self.weight[0].numel()


def is_layer(module: nn.Module) -> bool:
    """Whether kohya files can hold a delta for a module: a linear layer or a convolution."""
    row = row_of(plain_class(type(module)))
    return row is not None and row.family in ("linear", "conv") and row.outputs_first


def flat(path: str) -> str:
    """Return a path in the form of keys."""
    return path.replace(".", "_")


TEXT = "text_model_"


def lead(net: nn.Module) -> str:
    """Return the text before the paths of a network's layers in keys.

    Files have ``text_model_encoder_...`` for the text encoder, but newer versions of transformers
    have removed that module from `CLIPTextModel`.
    """
    return TEXT if _is_text_encoder(net) and not hasattr(net, "text_model") else ""


def elsewhere(net: nn.Module, path: str) -> str:
    """Return the flat path that a layer of this network has in other versions of transformers."""
    if not _is_text_encoder(net):
        return path
    return path.removeprefix(TEXT) if path.startswith(TEXT) else TEXT + path


def _is_text_encoder(net: nn.Module) -> bool:
    return plain_class(type(net)).__name__ == "CLIPTextModel"
