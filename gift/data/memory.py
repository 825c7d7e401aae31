"""Examples that are already in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gift.data.classes import classes_of
from gift.data.examples import IGNORED, Examples, Reader
from gift.data.reading import read_examples
from gift.data.targets import SEPARATOR, targets_of
from gift.errors import DataError, refuse


def tensors(
    inputs: Any,
    targets: Any,
    classes: Sequence[str] | None = None,
    task: str | None = None,
) -> Examples:
    """Create examples from tensors or arrays.

    Args:
        inputs: one row for each example.
        targets: class numbers, or the targets of another task.
        classes: names of the classes.
        task: "classification", "multi_label", "language" or "regression"; None decides by targets
            and network.

    Raises:
        DataError: if there are none, if there are not as many inputs as targets, or if labels are
            out of range.

    Example:
        >>> import torch
        >>> from gift.data import tensors
        >>> len(tensors(torch.zeros(3, 5), torch.tensor([0, 1, 1]), classes=["ant", "bee"]))
        3
    """
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets)
    counts = [len(t) if t.dim() else 0 for t in (x, y)]
    problems = []
    if 0 in counts or counts[0] != counts[1]:
        problems.append(f"there are {counts[0]} inputs and {counts[1]} targets, expected as many")
    task = task or (None if classes is None else "classification")
    whole = not (y.is_floating_point() or y.is_complex())
    if not problems and task in (None, "classification") and whole:
        problems += _out_of_range(y, None if classes is None else len(classes))
        y = y.long()
    refuse(DataError, "tensors", problems)
    names = None if classes is None else classes_of((), classes)
    return Examples(TensorDataset(x, y), task=task, classes=names)


def labelled(
    inputs: Sequence[Any],
    labels: Sequence[Any],
    reader: Reader,
    classes: Sequence[str] | None = None,
    augment: bool = False,
    task: str = "classification",
    standardise: bool = True,
) -> Examples:
    """Create examples from texts, pairs of texts, PIL images or image paths, and their labels.

    Args:
        inputs: inputs for the reader.
        labels: label of each input, a text or a number; for "multi_label" a list of texts.
        reader: converts inputs for the network: `TextReader`, `PictureReader`, or the reader of a
            network.
        classes: labels in the order of their numbers, `train.classes` for validation; or names for
            labels that are numbers. None sorts labels alphabetically, or numerically if they are
            numbers.
        augment: crop and flip images at random, for training.
        task: "classification", "regression", "multi_label" or "contrastive".
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1. Metrics and predictions are in the units of the labels.

    Raises:
        DataError: if there are none, if there are not as many inputs as labels, or if labels are
            not valid.

    Example:
        >>> from gift.data import labelled
        >>> examples = labelled(["a joy", "so deep"], ["good", "bad"], str.split)
        >>> examples.dataset[0], examples.classes
        ((['a', 'joy'], 1), ('bad', 'good'))
    """
    if not len(inputs) or len(inputs) != len(labels):
        counts = f"{len(inputs)} inputs and {len(labels)} labels"
        refuse(DataError, "examples", [f"there are {counts}, expected as many"])
    values = [label.item() if hasattr(label, "item") else label for label in labels]
    missing = [place for place, v in enumerate(values) if v is None or v != v]
    refuse(DataError, "examples", [f"example {place}: it has no label" for place in missing])
    if task == "multi_label":
        odd = [p for p, v in enumerate(values) if isinstance(v, str) or not hasattr(v, "__iter__")]
        problems = [f"example {p}: its label is {values[p]!r:.60}, expected a list" for p in odd]
        refuse(DataError, "examples", problems)
        texts = [SEPARATOR.join(map(str, names)) for names in values]
    else:
        texts = [str(value) for value in values]
    targets = targets_of(texts, task, classes, SEPARATOR, standardise)
    reasons = [f"example {place}: {reason}" for place, reason in targets.problems]
    refuse(DataError, "examples", reasons)
    return targets.of(
        read_examples(list(zip(inputs, targets.values, strict=True)), reader, augment)
    )


def _out_of_range(labels: Tensor, number: int | None) -> list[str]:
    """Return the problems with class numbers."""
    wrong = (labels < 0) & (labels != IGNORED)
    if number is not None:
        wrong |= labels >= number
    return [
        f"example {row[0]}: label {labels[tuple(row)].item()} is out of range"
        + ("" if number is None else f": there are {number} classes, numbered from 0")
        for row in wrong.nonzero().tolist()
    ]
