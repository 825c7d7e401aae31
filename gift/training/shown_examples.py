"""Examples that a report shows with predictions: evenly spread ones, and the worst mistakes."""

import heapq
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gift.core.io_spec import IOSpec
from gift.data.examples import Examples
from gift.private.torch.containers import tree_map
from gift.support.optional import require
from gift.training.drawings import bytes_of, png
from gift.training.predictions import Options
from gift.training.tasks import Regression, Task

NUMBER = 12
"""Number of examples of each kind."""

MOST_NUMBERS = 2000
"""Number of true and predicted numbers that are plotted."""

LONGEST = 400
"""Number of characters of a text that are shown."""


class ShownExample(NamedTuple):
    """An example and its prediction.

    Args:
        input: the text, or the name of the file, or the number of the example.
        true: the target, as a text.
        predicted: the prediction, as a text.
        loss: loss of the example.
        png: the image as PNG; empty if there is none.
    """

    input: str
    true: str
    predicted: str
    loss: float
    png: bytes = b""


class _Evaluated(NamedTuple):
    loss: float
    place: int
    true: str
    predicted: str


class ExampleCollector:
    """Collects the examples to show, while they are evaluated.

    Args:
        task: the task.
        data: the examples; those of a data loader have no places, and are not kept.
        is_on: whether to keep any.
    """

    def __init__(self, task: Task, data: Any, is_on: bool = True) -> None:
        self.task, self.data = task, data
        self.is_on = is_on and isinstance(data, Examples) and len(data) > 0
        count = min(NUMBER, len(data)) if self.is_on else 0
        self._spread = {place * len(data) // count for place in range(count)}
        self._every = -(-len(data) // MOST_NUMBERS) if self.is_on else 1
        self._numbers: list[tuple[float, float]] = []
        self._samples: list[_Evaluated] = []
        self._worst: list[_Evaluated] = []

    def see(self, places: list[int] | None, outputs: Any, batch: Any) -> None:
        """Note the examples of a batch.

        Args:
            places: their places in the data.
            outputs: what the network returned for them.
            batch: inputs and targets, on the device of the network.
        """
        if not self.is_on or places is None or not isinstance(outputs, Tensor):
            return
        if len(outputs) != len(places):
            return
        try:
            losses = [self._loss(outputs, batch, row) for row in range(len(places))]
        except Exception:  # a loss of the user may need several examples; a report does not
            self.is_on = False
            return
        if isinstance(self.task, Regression):
            self._see_numbers(places, outputs, batch)
        least = self._worst[0].loss if len(self._worst) >= NUMBER else -1.0
        for row, (place, loss) in enumerate(zip(places, losses, strict=True)):
            if place not in self._spread and loss <= least:
                continue
            one = _Evaluated(loss, place, *self._as_texts(outputs[row : row + 1], _row(batch, row)))
            if place in self._spread:
                self._samples.append(one)
            if one.true and one.true == one.predicted:
                continue
            heapq.heappush(self._worst, one)
            if len(self._worst) > NUMBER:
                heapq.heappop(self._worst)
            least = self._worst[0].loss if len(self._worst) >= NUMBER else -1.0

    def _see_numbers(self, places: list[int], outputs: Tensor, batch: Any) -> None:
        predicted, true = (
            side.reshape(len(places), -1) for side in self.task.shown(outputs, batch)
        )
        for row, place in enumerate(places):
            if place % self._every == 0:
                self._numbers += zip(true[row].tolist(), predicted[row].tolist(), strict=True)

    def _loss(self, outputs: Tensor, batch: Any, row: int) -> float:
        own = _row(batch, row)
        count = self.task.count(own)
        if not count:
            return 0.0
        return float(self.task.loss(outputs[row : row + 1], own)) / count

    def _as_texts(self, outputs: Tensor, batch: Any) -> tuple[str, str]:
        """Return target and prediction as texts."""
        target = self.task.targets(batch)
        known = IOSpec(None, self.task.classes, self.task.name, self.task.details)
        try:
            [found] = type(self.task).predicted([""], outputs, known, Options())
        except Exception:  # a task without predictions, such as that of language
            return "", ""
        if hasattr(found, "label"):
            return _name(target, self.task.classes), str(found.label)
        if hasattr(found, "labels") and isinstance(target, Tensor):
            chosen = target.flatten().nonzero().flatten().tolist()
            names = self.task.classes or tuple(map(str, range(target.numel())))
            ordered = [name for name in names if name in map(str, found.labels)]
            return _joined(names[n] for n in chosen), _joined(ordered)
        if hasattr(found, "value"):
            return _numbers(target.flatten().tolist()), _numbers(found.value)
        return "", ""

    def samples(self) -> list[ShownExample]:
        """Return the evenly spread examples."""
        return [self._shown(one) for one in sorted(self._samples, key=lambda one: one.place)]

    def numbers(self) -> list[tuple[float, float]]:
        """Return true and predicted numbers of evenly spread examples, for regression."""
        return self._numbers[:MOST_NUMBERS]

    def worst(self) -> list[ShownExample]:
        """Return the examples with the largest losses that were predicted wrongly."""
        return [self._shown(one) for one in sorted(self._worst, reverse=True)]

    def _shown(self, one: _Evaluated) -> ShownExample:
        raw = raw_input(self.data, one.place)
        return ShownExample(
            _text(raw, one.place), one.true, one.predicted, one.loss,
            _image(raw, self.data, one.place),
        )  # fmt: skip


def _row(batch: Any, row: int) -> Any:
    """Return one example of a batch, as a batch."""
    return tree_map(lambda t: t[row : row + 1] if isinstance(t, Tensor) and t.dim() else t, batch)


def _name(target: Any, classes: tuple[str, ...] | None) -> str:
    if isinstance(target, Tensor) and target.is_floating_point() and target.numel() > 1:
        target = target.flatten().argmax()
    number = int(target)
    return classes[number] if classes and 0 <= number < len(classes) else str(number)


def _joined(names: Any) -> str:
    return ", ".join(names) or "none"


def _numbers(values: Any) -> str:
    listed = values if isinstance(values, list) else [values]
    return ", ".join(f"{value:.5g}" for value in listed)


def raw_input(data: Examples, place: int) -> Any:
    """Return the file, text or image behind an example; None if there is none."""
    dataset: Any = data.dataset
    while hasattr(dataset, "indices"):
        place, dataset = dataset.indices[place], dataset.dataset
    source = getattr(dataset, "source", None)
    try:
        return None if source is None else source[place][0]
    except (LookupError, TypeError):
        return None


def _text(raw: Any, place: int) -> str:
    if isinstance(raw, tuple) and all(isinstance(part, str) for part in raw):
        raw = " / ".join(raw)
    if not isinstance(raw, str | os.PathLike):
        return f"example {place}"
    text = os.path.basename(raw) if os.path.isfile(raw) else str(raw)
    if os.path.isfile(raw):
        text = os.path.join(os.path.basename(os.path.dirname(raw)), text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _image(raw: Any, data: Examples, place: int) -> bytes:
    """Return a small picture of an input, if it is one."""
    kind = getattr(data.reader, "kind", "picture")
    if kind not in ("picture", "segmentation", "detector"):
        return b""
    try:
        if isinstance(raw, str | os.PathLike) or hasattr(raw, "convert"):
            images = require("gift.data.readers.images", "vision")
            f = require("torchvision.transforms.v2.functional", "vision")
            return png([f.pil_to_tensor(images.opened(raw, "RGB"))])
        item = data[place]
        inputs = item[0] if not isinstance(item, Mapping) else item.get("pixel_values")
        if isinstance(inputs, Tensor) and inputs.dim() == 3 and inputs.shape[0] in (1, 3):
            low, high = float(inputs.min()), float(inputs.max())
            return png([bytes_of((inputs - low) / max(high - low, 1e-12))])
    except Exception:  # no picture is better than no report
        return b""
    return b""


def gathered(parts: list[list[ShownExample]], is_worst: bool) -> list[ShownExample]:
    """Merge what several processes have collected."""
    found = [one for part in parts for one in part]
    if is_worst:
        found.sort(key=lambda one: -one.loss)
    return found[:NUMBER]
