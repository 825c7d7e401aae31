"""New last layers with another number of classes for torchvision's detectors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from gift.core.dynamic_class import plain_class
from gift.core.io_spec import forget_classes
from gift.core.iterator import Site
from gift.factories.actions import Action
from gift.factories.checks import Check
from gift.factories.serializable import recorded
from gift.layers.table import row_of


class Predictor(NamedTuple):
    """The part of a detector that predicts classes.

    Args:
        layers: names of its layers that have outputs for each class; "*" stands for any number.
        classes: function that returns the number of classes of the part.
        attribute: the attribute that holds that number for the detector, if there is one.
        std: standard deviation of the new weights; None keeps the layer's own initialisation.
        bias: value of the new biases; None keeps the layer's own initialisation.
    """

    layers: tuple[str, ...]
    classes: Callable[[Any], int]
    attribute: str | None = None
    std: float | None = None
    bias: float | None = None


_RARE = -math.log((1 - 0.01) / 0.01)  # objects are rare at the start: Lin et al. 2017, section 4.1

# By names of torchvision's classes, since it need not be installed; initialised as there.
PREDICTORS = {
    "FastRCNNPredictor": Predictor(
        ("cls_score", "bbox_pred"), lambda head: head.cls_score.out_features
    ),
    "MaskRCNNPredictor": Predictor(
        ("mask_fcn_logits",), lambda head: head.mask_fcn_logits.out_channels
    ),
    "RetinaNetClassificationHead": Predictor(
        ("cls_logits",), lambda head: head.num_classes, "num_classes", 0.01, _RARE
    ),
    "FCOSClassificationHead": Predictor(
        ("cls_logits",), lambda head: head.num_classes, "num_classes", 0.01, _RARE
    ),
    "SSDClassificationHead": Predictor(
        ("module_list.*",), lambda head: head.num_columns, "num_columns", 0.01, 0.0
    ),
    "SSDLiteClassificationHead": Predictor(
        ("module_list.*.1",), lambda head: head.num_columns, "num_columns", 0.03, 0.0
    ),
}


def _layers(network: nn.Module) -> dict[int, tuple[nn.Module, Predictor]]:
    """Map the id of each layer to be replaced to the part that it belongs to."""
    found: dict[int, tuple[nn.Module, Predictor]] = {}
    for head in network.modules():
        row = PREDICTORS.get(plain_class(type(head)).__name__)
        if row is None:
            continue
        for path in row.layers:
            parts = [head]
            for name in path.split("."):
                parts = [
                    child
                    for part in parts
                    for key, child in part.named_children()
                    if name in ("*", key)
                ]
            found |= {id(layer): (head, row) for layer in parts}
    return found


@recorded
def mc_detection_head() -> Check:
    """Match the last layers of torchvision's detectors, which have outputs for each class."""

    def prepare(network: nn.Module) -> Callable[..., bool]:
        layers = _layers(network)
        return lambda *place: id(Site(*place).module) in layers

    return Check(prepare=prepare)


@recorded
def ma_replace_detection_head(num_classes: int) -> Action:
    """Replace a layer that `mc_detection_head` matches by one for that many classes.

    Raises:
        ValueError: if `num_classes` is below 2, since the background is one of the classes.
    """
    if type(num_classes) is not int or num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes!r}, expected an integer of at least 2: the background is "
            "one of the classes"
        )

    def prepare(network: nn.Module) -> Callable[..., None]:
        layers = _layers(network)
        known = {id(head): row.classes(head) for head, row in layers.values()}

        def act(*place: Any) -> None:
            site = Site(*place)
            old = site.module
            head, row = layers[id(old)]
            new = _like(old, num_classes, known[id(head)], row)
            new.train(old.training)
            assert site.parent is not None
            site.parent._modules[site.name] = new
            forget_classes(network)
            if row.attribute is not None:
                setattr(head, row.attribute, num_classes)

        return act

    return Action(prepare=prepare)


def _like(old: Any, num_classes: int, known: int, row: Predictor) -> nn.Module:
    """Return a layer like the old one, for another number of classes."""
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    layer: Any = row_of(type(old))  # of a linear layer or a convolution
    new = layer.like(old, layer.features(old).outputs // known * num_classes, **like)
    if row.std is not None:
        nn.init.normal_(new.weight, std=row.std)
    if row.bias is not None and new.bias is not None:
        nn.init.constant_(new.bias, row.bias)
    return new
