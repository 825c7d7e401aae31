"""A new head if the examples need one."""

import warnings
from collections.abc import Callable

from torch import nn

from gift.data import Examples
from gift.errors import GiftWarning, JobError, some
from gift.factories.heads import last_linear
from gift.factories.segmentation import segmentation_heads
from gift.jobs.models import Strategy
from gift.strategies import (
    DetectionHeadStrategy,
    FineTuningStrategy,
    HeadReplacementStrategy,
    SegmentationHeadStrategy,
    merge_strategies,
)
from gift.strategies.classic import new_heads
from gift.zoo import LoadedNetwork


def with_head(
    strategy: Strategy, loaded: LoadedNetwork, train: Examples, is_random: bool = False
) -> FineTuningStrategy:
    """Return the strategy of a job, preceded by a head replacement if the examples need one.

    Args:
        strategy: strategy section of the job.
        loaded: the network.
        train: the training examples.
        is_random: whether the network has random weights.

    Raises:
        JobError: if a new head is requested but there are no classes.
    """
    made = strategy.made()
    if strategy.head == "keep" or any(new_heads(made)):
        return made
    count = 1 if train.task == "regression" else len(train.classes or ())
    count = 0 if train.task == "contrastive" else count  # vectors come from the body
    if not count:
        if strategy.head == "new":
            raise JobError("strategy.head is 'new'", [f"{train.task} examples have no classes"])
        return made
    if strategy.head == "auto" and not is_random and _is_for(loaded, train.classes, count):
        return made
    head = _HEADS.get(train.task or "", HeadReplacementStrategy)
    return merge_strategies([head(count), made])


_HEADS: dict[str, Callable[[int], FineTuningStrategy]] = {
    "detection": DetectionHeadStrategy,
    "segmentation": SegmentationHeadStrategy,
}
"""Strategies that replace the head, of tasks whose head is not a linear layer."""


def _is_for(loaded: LoadedNetwork, classes: tuple[str, ...] | None, count: int) -> bool:
    """Whether the head of a network is for these classes, as far as this is known."""
    if loaded.classes is not None:
        return loaded.classes == classes
    saved = getattr(getattr(loaded.net, "config", None), "architectures", None)
    if saved and type(loaded.net).__name__ not in saved:
        return False  # transformers added a new head to the saved body
    return outputs_of(loaded.net, loaded.task) in ((1, 2) if count == 2 else (count,))


def warn_of_fresh(loaded: LoadedNetwork) -> None:
    """Warn of parameters with random values that the enabled network does not train."""
    known = dict(loaded.net.named_parameters())
    frozen = [n for n in loaded.fresh if n in known and not known[n].requires_grad]
    if frozen:
        warnings.warn(
            f"{some(frozen)} have random values, as the weights of the network lack them, and are "
            "not trained: RecommendedFineTuningStrategy trains them, or ModulesFineTuningStrategy "
            "merged before another strategy",
            GiftWarning,
            stacklevel=4,
        )


def outputs_of(net: nn.Module, task: str = "classification") -> int | None:
    """Return the number of outputs of the head; None if there is none."""
    if task == "segmentation":
        heads = segmentation_heads(net)
        return getattr(heads[0], "out_channels", None) if heads else None
    _, head = last_linear(net)
    names = ("out_features", "nf", "out_channels")
    return next((value for n in names if (value := getattr(head, n, None)) is not None), None)
