"""Weights of classes and of examples, and orders of examples by difficulty."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from gift.data.examples import IGNORED, Examples
from gift.data.reading import ReadDataset
from gift.errors import TrainingError

BALANCES = ("weights", "sampler")
LOOKED_AT = 200
"""Number of masks whose pixels are counted."""


def targets_in(examples: Examples) -> list[Any]:
    """Return the target of each example, without reading inputs where that is possible."""
    dataset = examples.dataset
    if isinstance(dataset, Subset):
        whole = targets_in(Examples(dataset.dataset))
        return [whole[place] for place in dataset.indices]
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors[1])
    if isinstance(dataset, ReadDataset):
        labels = getattr(dataset.source, "labels", None)
        if labels is not None:
            return list(labels)
        if isinstance(dataset.source, list):
            return [label for _, label in dataset.source]
    items = (dataset[place] for place in range(len(examples)))
    return [item["labels"] if isinstance(item, Mapping) else item[1] for item in items]


def class_weights(examples: Any, task: str, number: int) -> Tensor:
    """Return a weight for each class, inverse to how often it is there, or for "multi_label" the
    ratio of examples that are not of a class to those that are.

    The weight of a class is the number of examples, divided by the number of classes and by the
    number of examples of the class: "balanced" in scikit-learn. Its mean over all examples is 1.

    Raises:
        TrainingError: if the task has no classes, or there is no example of a class.
    """  # fmt: skip
    counts, total = _counts(_examples(examples), task, number)
    if task == "multi_label":
        _refuse_absent(counts, examples)
        return (total - counts) / counts
    _refuse_absent(counts, examples)
    return total / (number * counts)


def example_weights(examples: Any, task: str, number: int) -> Tensor:
    """Return the weight with which each example is drawn, so that classes are equally frequent.

    An example of several classes has the weight of its rarest one.

    Raises:
        TrainingError: if examples have no class, or several for each pixel.
    """
    data = _examples(examples)
    if task not in ("classification", "multi_label"):
        raise TrainingError(f"balance='sampler' is for classes of examples, not for {task}")
    counts, total = _counts(data, task, number)
    each = total / counts.clamp_min(1)
    targets = targets_in(data)
    if task == "classification":
        return torch.stack([each[int(target)] for target in targets])
    weights = [each[torch.as_tensor(target) > 0] for target in targets]
    return torch.stack([own.max() if len(own) else each.min() for own in weights])


def _examples(examples: Any) -> Examples:
    if not isinstance(examples, Examples):
        raise TrainingError("balance and curriculum need examples one by one, not a data loader")
    return examples


def _counts(examples: Examples, task: str, number: int) -> tuple[Tensor, float]:
    """Return how often each class is there, and how often any."""
    if task not in ("classification", "multi_label", "segmentation"):
        raise TrainingError(f"balance is for tasks with classes, not for {task}")
    if task == "segmentation":
        every = -(-len(examples) // LOOKED_AT)
        masks = [examples.dataset[place][1] for place in range(0, len(examples), every)]
        pixels = torch.cat([torch.as_tensor(mask).flatten() for mask in masks]).long()
        counts = torch.bincount(pixels[pixels != IGNORED], minlength=number).double()
        return counts.float(), float(counts.sum())
    targets = torch.stack([torch.as_tensor(target) for target in targets_in(examples)])
    if task == "multi_label":
        return targets.float().sum(0), float(len(targets))
    if targets.dim() > 1 and targets.shape[1] == number and targets.is_floating_point():
        targets = targets.argmax(1)
    known = targets.flatten().long()
    known = known[known != IGNORED]
    return torch.bincount(known, minlength=number).float(), float(len(known))


def _refuse_absent(counts: Tensor, examples: Any) -> None:
    absent = [number for number, count in enumerate(counts.tolist()) if not count]
    if absent:
        names = examples.classes
        shown = [names[number] if names else str(number) for number in absent[:5]]
        raise TrainingError(
            f"balance='weights' has no weight for {', '.join(shown)}, of which there is no "
            "example: leave the class out, or choose balance='sampler'"
        )


def lengths(examples: Any) -> Tensor:
    """Return the length of each example: tokens of a text, or numbers of its input."""
    data = _examples(examples)
    found = []
    for place in range(len(data)):
        item = data.dataset[place]
        given = item if isinstance(item, Mapping) else item[0]
        if isinstance(given, Mapping):
            given = given.get("input_ids", next(iter(given.values())))
        found.append(given.numel() if isinstance(given, Tensor) else len(given))
    return torch.tensor(found, dtype=torch.float64)


def difficulties(
    examples: Any, kind: str | Callable[[Any], float], losses: Callable[[], Tensor]
) -> Tensor:
    """Return the difficulty of each example.

    Args:
        examples: the training examples.
        kind: "length", "loss", or a function of an example.
        losses: returns the loss of each example, of the network as it is.

    Raises:
        TrainingError: if a difficulty is not a number.
    """
    data = _examples(examples)
    if kind == "length":
        return lengths(data)
    if kind == "loss":
        found = losses()
    else:
        assert callable(kind)
        values = [float(kind(data.dataset[place])) for place in range(len(data))]
        found = torch.tensor(values, dtype=torch.float64)
    odd = (~found.isfinite()).nonzero().flatten().tolist()
    if odd:
        raise TrainingError(
            f"curriculum: the difficulty of example {odd[0]} is {found[odd[0]].item()}"
        )
    return found


def easiest(difficulty: Tensor, progress: float, start: float = 0.2) -> Tensor:
    """Return the indices of the examples that a curriculum has reached.

    The share of the easiest examples is its competence (Platanios et al. 2019,
    https://arxiv.org/abs/1903.09848, equation 3): sqrt(t (1 - c²) + c²) for the progress t from 0
    to 1 and the share c at the beginning.

    Args:
        difficulty: difficulty of each example.
        progress: share of the curriculum that is over, from 0 to 1.
        start: share of the examples at the beginning.

    Example:
        >>> easiest(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.0, start=0.5).tolist()
        [1, 2]
    """
    share = min(1.0, (min(progress, 1.0) * (1 - start**2) + start**2) ** 0.5)
    count = min(len(difficulty), max(1, -(-round(share * len(difficulty) * 1e6) // 1_000_000)))
    return difficulty.argsort(stable=True)[:count]
