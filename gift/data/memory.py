"""Examples that are tensors already."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gift.data.classes import classes_of
from gift.data.examples import Examples
from gift.data.problems import refuse


def tensors(
    inputs: Any,
    targets: Any,
    classes: Sequence[str] | None = None,
    task: str = "classification",
) -> Examples:
    """Examples that are tensors, or arrays, already.

    Args:
        inputs: one row for each example.
        targets: numbers of classes, or what the task has.
        classes: names of the classes.
        task: "classification", "language" or "regression".

    Raises:
        DataError: if there are none, their numbers differ, or labels are out of range.

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
    elif task == "classification" and not (y.is_floating_point() or y.is_complex()):
        problems += _out_of_range(y, None if classes is None else len(classes))
        y = y.long()
    refuse("tensors", problems)
    names = None if classes is None else classes_of((), classes)
    return Examples(TensorDataset(x, y), task=task, classes=names)


def _out_of_range(labels: Tensor, number: int | None) -> list[str]:
    """Problems with numbers of classes; -100 is for what is to be ignored."""
    wrong = (labels < 0) & (labels != -100)
    if number is not None:
        wrong |= labels >= number
    return [
        f"example {row[0]}: label {labels[tuple(row)].item()} is out of range"
        + ("" if number is None else f": there are {number} classes, numbered from 0")
        for row in wrong.nonzero().tolist()
    ]
