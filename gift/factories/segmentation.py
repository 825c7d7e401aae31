"""New last layers with another number of classes for segmentation networks."""

from collections.abc import Callable
from typing import Any

from torch import nn

from gift.core.dynamic_class import plain_class
from gift.core.iterator import Site
from gift.factories.actions import Action, replacing_head
from gift.factories.checks import Check
from gift.factories.serializable import recorded
from gift.layers.table import family_of, row_of

HEADS = {
    "FCN": ("classifier.4", "aux_classifier.4"),
    "DeepLabV3": ("classifier.4", "aux_classifier.4"),
    "LRASPP": ("classifier.low_classifier", "classifier.high_classifier"),
}
"""Last layers of torchvision's segmentation networks, by their class; some may be absent."""


def segmentation_heads(network: nn.Module) -> list[nn.Module]:
    """Return the convolutions that give the logits of a segmentation network.

    They are known for torchvision's networks. Else it is the last convolution in registration order
    that stands in no auxiliary head; if the network has a config, one for its number of classes.
    """
    modules = dict(network.named_modules())
    for module in modules.values():
        paths = HEADS.get(plain_class(type(module)).__name__, ())
        inner = dict(module.named_modules())
        if found := [inner[path] for path in paths if path in inner]:
            return found
    layers = [
        module
        for path, module in modules.items()
        if family_of(module) == "conv" and not any(p.startswith("aux") for p in path.split("."))
    ]
    count = getattr(getattr(network, "config", None), "num_labels", None)
    fitting = [layer for layer in layers if getattr(layer, "out_channels", None) == count]
    return (fitting or layers)[-1:]


@recorded
def mc_segmentation_head() -> Check:
    """Match the convolutions that give the logits of a segmentation network."""

    def prepare(network: nn.Module) -> Callable[..., bool]:
        heads = {id(layer) for layer in segmentation_heads(network)}
        return lambda *place: id(Site(*place).module) in heads

    return Check(prepare=prepare)


@recorded
def ma_replace_segmentation_head(num_classes: int) -> Action:
    """Replace a convolution by one for that many classes, of the same kernel.

    Raises:
        ValueError: if `num_classes` is below 1, or the module is not a convolution.
    """
    return replacing_head(num_classes, _like)


def _like(old: nn.Module, num_classes: int) -> nn.Module:
    """Return a convolution like `old` with that many outputs."""
    row = row_of(type(old))
    if row is None or row.like is None or family_of(old) != "conv":
        name = plain_class(type(old)).__name__
        raise ValueError(f"{name} is not a convolution, which gives the logits")
    weight: Any = old.weight
    return row.like(old, num_classes, device=weight.device, dtype=weight.dtype)
