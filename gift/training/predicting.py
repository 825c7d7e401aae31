"""Predictions of a network for images and texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
from gift.training.tasks import accepted, keywords_of, main_output


@dataclass(frozen=True)
class Prediction:
    """The predicted class of an input.

    Args:
        input: the input.
        label: name of the most probable class, or its number if names are not known.
        probability: probability of that class.
        probabilities: probabilities of all classes.
        top: number of classes to show.
    """

    input: Any
    label: str | int
    probability: float
    probabilities: dict[str | int, float] = field(repr=False)
    top: int = 1

    def best(self, number: int | None = None) -> list[tuple[str | int, float]]:
        """Return the most probable classes in descending order; None returns `top` of them."""
        ordered = sorted(self.probabilities.items(), key=lambda item: -item[1])
        return ordered[: self.top if number is None else number]

    def __str__(self) -> str:
        return f"{_shown(self.input)}: " + ", ".join(f"{name} {p:.1%}" for name, p in self.best())


@dataclass(frozen=True)
class Detected:
    """The objects detected in an image, in descending order of their scores.

    Args:
        input: the input.
        boxes: left, top, right and bottom of each object.
        labels: name of the class of each object, or its number if names are not known.
        scores: confidence of each detection.
    """

    input: Any
    boxes: list[list[float]]
    labels: list[str | int]
    scores: list[float]

    def __str__(self) -> str:
        lines = [
            f"  {label} {score:.1%} at {', '.join(f'{side:.0f}' for side in box)}"
            for box, label, score in zip(self.boxes, self.labels, self.scores, strict=True)
        ]
        return "\n".join([f"{_shown(self.input)}:", *(lines or ["  nothing"])])


def remember(net: nn.Module, examples: Examples, task: str | None = None) -> None:
    """Record on a network how its inputs are read and what its classes are, for `predict`.

    Args:
        net: the network.
        examples: the training examples.
        task: task of the training; None uses the task of the examples, or "classification".
    """
    set_io_spec(net, examples.reader, examples.classes, task or examples.task or "classification")


def predict(
    net: nn.Module,
    inputs: Any,
    reader: Reader | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 32,
    top: int = 1,
    device: str | None = None,
) -> list[Prediction] | list[Detected]:
    """Predict the classes of images or texts, or detect the objects in images.

    Training modes and random states are restored afterwards.

    Args:
        net: the network, fine-tuned or not.
        inputs: paths of images, PIL images, texts, pairs of texts, or tensors for the network; a
            single tensor is a batch.
        reader: converts inputs to tensors; None uses the reader that `finetune` or `load_network`
            recorded.
        classes: names of the classes; None uses the recorded ones.
        batch_size: number of inputs to compute together.
        top: number of classes that a prediction shows.
        device: a torch device, or "auto"; the network is moved there. None leaves the network
            where it is.

    Raises:
        DataError: if an input cannot be read.
        TrainingError: if the reader is not known, or the network does not return classes.
        ValueError: if `batch_size` or `top` is below 1.

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
    for name, value in (("batch_size", batch_size), ("top", top)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    given = _listed(inputs)
    known = io_spec_of(net)
    reader = known.reader if reader is None else reader
    names = known.classes if classes is None else distinct(classes)
    if known.task not in ("classification", "detection"):
        raise TrainingError(
            f"this network is for {known.task}, predict is for classes and boxes: call the network "
            "itself, or the generate of transformers"
        )
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
            batch = tree_map(lambda t: t.to(place), _batch(part, reader))
            outputs = (
                net(**accepted(batch, keywords_of(net))) if isinstance(batch, dict) else net(batch)
            )
            show = _detected if known.task == "detection" else _predicted
            found += show(part, main_output(outputs), names, top)
    return found


def _listed(inputs: Any) -> list[Any]:
    """Return the inputs as a list; a single image or text becomes a list of one."""
    if isinstance(inputs, str | Path) or not isinstance(inputs, Iterable):
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
            f"how the network reads {_shown(part[0])} is not known: give reader=PictureReader(...) "
            "or TextReader(...) of gift.data"
        )
    return reader.collate([reader(item) for item in part])


def _predicted(
    part: list[Any], outputs: Any, names: tuple[str, ...] | None, top: int
) -> list[Prediction]:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TrainingError(f"the network gives {shape}, expected logits (batch, classes)")
    count = outputs.shape[1]
    if names is not None and len(names) != count:
        raise TrainingError(
            f"the network distinguishes {count} classes, but {len(names)} are named: give "
            "predict(..., classes=...)"
        )
    labels: Sequence[str | int] = range(count) if names is None else names
    rows = outputs.cpu().double().softmax(1).tolist()
    found = []
    for item, row in zip(part, rows, strict=True):
        share = max(row)
        named = dict(zip(labels, row, strict=True))
        found.append(Prediction(item, labels[row.index(share)], share, named, top))
    return found


def _detected(
    part: list[Any], outputs: Any, names: tuple[str, ...] | None, top: int
) -> list[Detected]:
    found = []
    for item, objects in zip(part, outputs, strict=True):
        numbers = objects["labels"].tolist()
        if names is not None and max(numbers, default=0) >= len(names):
            raise TrainingError(f"the network finds class {max(numbers)}, {len(names)} are named")
        labels = [number if names is None else names[number] for number in numbers]
        found.append(Detected(item, objects["boxes"].tolist(), labels, objects["scores"].tolist()))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    text = str(value) if isinstance(value, str | Path | tuple) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
