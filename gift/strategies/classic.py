"""The classic strategies: train everything, nothing, or a new head."""

from collections.abc import Iterator

from gift.factories import (
    Action,
    ma_freeze,
    ma_replace_detection_head,
    ma_replace_head,
    ma_replace_segmentation_head,
    mc_any,
    mc_detection_head,
    mc_last_linear,
    mc_path,
    mc_segmentation_head,
    pa_train,
    pc_any,
)
from gift.strategies.base import FineTuningStrategy, register_strategy


@register_strategy
class FullFineTuningStrategy(FineTuningStrategy):
    """Train every parameter of the network.

    Merged after a strategy that replaces the head, it trains everything else.
    """

    def __init__(self) -> None:
        super().__init__(para_caps=[(pc_any(), pa_train())])


@register_strategy
class FreezeStrategy(FineTuningStrategy):
    """Freeze every parameter of the network.

    Args:
        statistics: whether to keep norm layers in evaluation mode too, so that their running
            statistics are frozen.
    """

    def __init__(self, statistics: bool = False) -> None:
        super().__init__([(mc_any(), ma_freeze(statistics=statistics))])


@register_strategy
class HeadReplacementStrategy(FineTuningStrategy):
    """Replace the head for another number of classes, train it, and freeze the rest.

    Args:
        num_classes: number of outputs of the new head.
        head_name: dotted path of the layer to replace, ``fc``; None means the last linear layer, or
            the last 1x1 convolution of a network that has no linear layer.

    Raises:
        ValueError: if `num_classes` is below 1.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import HeadReplacementStrategy
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> report = enable_fine_tuning(net, HeadReplacementStrategy(num_classes=4))
        >>> [tuple(p.shape) for p in net.parameters()]
        [(4, 16), (4,)]
    """

    def __init__(self, num_classes: int, head_name: str | None = None) -> None:
        head = mc_last_linear() if head_name is None else mc_path(head_name)
        super().__init__([(head, ma_replace_head(num_classes))])


@register_strategy
class DetectionHeadStrategy(FineTuningStrategy):
    """Replace the last layers of a torchvision detector for other classes, and freeze the rest.

    It supports Faster and Mask R-CNN, RetinaNet, FCOS, SSD and SSDlite. Layers that find boxes
    regardless of class are kept.

    Args:
        num_classes: number of classes, including the background, which is class 0.

    Raises:
        ValueError: if `num_classes` is below 2.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__([(mc_detection_head(), ma_replace_detection_head(num_classes))])


@register_strategy
class SegmentationHeadStrategy(FineTuningStrategy):
    """Replace the last layers of a segmentation network for other classes, and freeze the rest.

    They are convolutions, with kernels of any size: those of torchvision's networks, also of their
    auxiliary heads, else the last convolution.

    Args:
        num_classes: number of classes, including the background if that is one.
        head_name: dotted path of the layer to replace; None finds it.

    Raises:
        ValueError: if `num_classes` is below 1.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import SegmentationHeadStrategy
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 21, 1))
        >>> report = enable_fine_tuning(net, SegmentationHeadStrategy(num_classes=2))
        >>> [tuple(p.shape) for p in net.parameters()]
        [(2, 8, 1, 1), (2,)]
    """

    def __init__(self, num_classes: int, head_name: str | None = None) -> None:
        head = mc_segmentation_head() if head_name is None else mc_path(head_name)
        super().__init__([(head, ma_replace_segmentation_head(num_classes))])


_MAKE_HEADS = tuple(
    made.__name__
    for made in (ma_replace_head, ma_replace_detection_head, ma_replace_segmentation_head)
)


def new_heads(strategy: FineTuningStrategy) -> Iterator[int]:
    """Yield the numbers of classes of the heads that a strategy makes."""
    for cap in strategy.module_caps:
        if isinstance(cap.action, FineTuningStrategy):
            yield from new_heads(cap.action)
        elif isinstance(cap.action, Action) and cap.action.recipe[0] in _MAKE_HEADS:
            yield cap.action.recipe[1]["num_classes"]
