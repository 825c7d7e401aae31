"""A new head if the classes need one."""

from torch import nn

from gift.data import Examples
from gift.errors import JobError
from gift.factories.checks import last_linear
from gift.jobs.models import Strategy
from gift.strategies import (
    DetectionHeadStrategy,
    FineTuningStrategy,
    HeadReplacementStrategy,
    merge_strategies,
)
from gift.strategies.classic import new_heads
from gift.zoo import LoadedNetwork


def with_head(
    strategy: Strategy, loaded: LoadedNetwork, train: Examples, is_random: bool = False
) -> FineTuningStrategy:
    """Return the strategy of a job, preceded by a head replacement if the classes need one.

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
    if train.classes is None:
        if strategy.head == "new":
            raise JobError("strategy.head is 'new'", [f"{train.task} examples have no classes"])
        return made
    if strategy.head == "auto" and not is_random and _is_for(loaded, train.classes):
        return made
    count = len(train.classes)
    if train.task == "detection":
        return merge_strategies([DetectionHeadStrategy(count), made])
    return merge_strategies([HeadReplacementStrategy(count), made])


def _is_for(loaded: LoadedNetwork, classes: tuple[str, ...]) -> bool:
    """Whether the head of a network is for these classes, as far as this is known."""
    if loaded.classes is not None:
        return loaded.classes == classes
    saved = getattr(getattr(loaded.net, "config", None), "architectures", None)
    if saved and type(loaded.net).__name__ not in saved:
        return False  # transformers added a new head to the saved body
    return outputs_of(loaded.net) == len(classes)


def outputs_of(net: nn.Module) -> int | None:
    """Return the number of outputs of the last linear layer; None if there is none."""
    _, head = last_linear(net)
    return getattr(head, "out_features", getattr(head, "nf", None))
