"""Predictions of a network."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.frozen_norms import kept_modes
from gift.core.io_spec import io_spec_of, set_io_spec
from gift.data.classes import distinct
from gift.data.examples import Examples, Reader
from gift.errors import TrainingError
from gift.private.torch.containers import tree_map
from gift.training.distributed import device_of
from gift.training.predictions import Options, shown
from gift.training.tasks import TASKS


def remember(
    net: nn.Module,
    examples: Examples,
    task: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Record on a network how its inputs are read and what its outputs are, for `predict`.

    Args:
        net: the network.
        examples: the training examples.
        task: task of the training; None uses the task of the examples, or "classification".
        details: what else the task must know; None uses those of the examples.
    """
    name = task or examples.task or "classification"
    more = examples.details if details is None else details
    set_io_spec(net, examples.reader, examples.classes, name, more)


def predict(
    net: nn.Module,
    inputs: Any,
    reader: Reader | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 32,
    top: int | None = None,
    device: str | None = None,
    threshold: float | None = None,
    max_new_tokens: int = 128,
) -> list[Any]:
    """Predict for images, texts, rows of tables or tensors, whatever the network is for.

    The result has an object for each input: `Prediction` for classes, `Labels` for any number of
    classes, `Number` for regression, `Segmented` for the pixels and `Detected` for the objects of
    images, `Written` for what a language model answers.

    Training modes and random states are restored afterwards.

    Args:
        net: the network, fine-tuned or not.
        inputs: paths of images or sounds, PIL images, texts, pairs of texts, rows of a table by
            column, chats (lists of messages), or tensors for the network; a single tensor is a
            batch.
        reader: converts inputs to tensors; None uses the reader that `finetune` or `load_network`
            recorded.
        classes: names of the classes; None uses the recorded ones.
        batch_size: number of inputs to compute together.
        top: number of classes that a prediction shows, None is 1; or largest number of objects in
            an image, None is all.
        device: a torch device, or "auto"; the network is moved there. None leaves the network
            where it is.
        max_new_tokens: largest number of tokens that a language model writes for a prompt.
        threshold: lowest score of a detected object, None is 0; or, where an input may have any
            number of classes, lowest probability of its classes, None is 0.5.

    Raises:
        DataError: if an input cannot be read.
        TrainingError: if the reader is not known, or the outputs do not fit the task.
        ValueError: if `batch_size`, `top` or `max_new_tokens` is below 1, or `threshold` not from
            0 to 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift.training.predicting import predict
        >>> net = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.eye(2)), net.bias.zero_()
        >>> [prediction] = predict(net, torch.tensor([[0.0, 3.0]]), classes=["ant", "bee"], top=2)
        >>> print(prediction)
        tensor [2]: bee 95.3%, ant 4.7%
    """
    _check(
        threshold,
        batch_size=batch_size,
        top=1 if top is None else top,
        max_new_tokens=max_new_tokens,
    )
    given = _listed(inputs)
    known = io_spec_of(net)
    names = known.classes if classes is None else distinct(classes)
    known = replace(known, reader=known.reader if reader is None else reader, classes=names)
    if known.task not in TASKS:
        raise TrainingError(f"the network is for {known.task!r}, expected one of {sorted(TASKS)}")
    task, options = TASKS[known.task], Options(top, threshold, max_new_tokens)
    place = _moved(net, device)
    found: list[Any] = []
    devices = [place] if place.type != "cpu" else []
    with (
        kept_modes(net),
        torch.no_grad(),
        torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"),
    ):
        net.eval()
        for start in range(0, len(given), batch_size):
            part = given[start : start + batch_size]
            batch = tree_map(lambda t: t.to(place), _batch(part, known.reader))
            found += task.predicted(part, task.answered(net, batch, known, options), known, options)
    return found


def _check(threshold: Any, **counts: Any) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 <= threshold <= 1):
        raise ValueError(f"threshold is {threshold!r}, expected a number from 0 to 1")


def _listed(inputs: Any) -> list[Any]:
    """Return the inputs as a list; a single image, text or row becomes a list of one."""
    if isinstance(inputs, str | Path | Mapping) or not isinstance(inputs, Iterable):
        return [inputs]
    return list(inputs)


def _moved(net: nn.Module, device: str | None) -> torch.device:
    """Move the network if a device is given, and return its device."""
    if device is not None:
        net.to(device_of(device))
    tensors = [*dict(net.named_parameters()).values(), *net.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _batch(part: list[Any], reader: Reader | None) -> Any:
    if all(isinstance(item, Tensor) for item in part):
        return torch.stack(part) if len({item.shape for item in part}) == 1 else part
    if reader is None:
        raise TrainingError(
            f"how the network reads {shown(part[0])} is not known: give reader=PictureReader(...) "
            "or TextReader(...) of gift.data"
        )
    return reader.collate([reader(item) for item in part])
