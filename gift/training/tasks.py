"""What a batch is for each task: its loss, its metrics, and what can be wrong with it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.data.examples import IGNORED
from gift.report import some
from gift.tensors import dtype_name
from gift.training.errors import TrainingError

Loss = Callable[[Any, Any], Tensor]


class Task:
    """How a network learns from batches; a subclass for each task.

    A loss is a sum over what `count` counts, so that batches of any size can be added up.

    Args:
        loss: called with outputs and targets, gives a mean; None is the task's own loss.
        smoothing: share of the target that is spread over all classes.
        classes: names of the classes, None where they are not known.
    """

    name: ClassVar[str]
    watch: ClassVar[str] = "loss"

    def __init__(
        self,
        loss: Loss | None = None,
        smoothing: float = 0.0,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.own_loss, self.smoothing, self.classes = loss, smoothing, classes
        self.number_of_classes = len(classes) if classes else 0
        self.keywords: set[str] | None = None

    def fit(self, net: nn.Module, batch: Any) -> None:
        """Try a batch, see what the network takes and gives.

        Raises:
            TrainingError: if the two do not fit each other.
        """
        self.keywords = keywords_of(net)
        self._fit(self.outputs(net, batch), batch)

    def _fit(self, outputs: Any, batch: Any) -> None:
        """See whether the outputs fit the targets."""

    def check(self, batch: Any) -> None:
        """Look at targets, before they are moved to a device.

        Raises:
            TrainingError: if they are none.
        """

    def count(self, batch: Any) -> int:
        """How many targets a batch has."""
        return len(self.targets(batch))

    def outputs(self, net: Any, batch: Any) -> Any:
        """What the network gives."""
        if isinstance(batch, Mapping):
            known = {k: v for k, v in batch.items() if k not in ("labels", "label")}
            return main_output(net(**taken(known, self.keywords)))
        return main_output(net(batch[0]))

    def targets(self, batch: Any) -> Any:
        """What it should give."""
        if isinstance(batch, Mapping):
            for name in ("labels", "label"):
                if name in batch:
                    return batch[name]
            raise TrainingError(f"the examples have no 'labels', but {sorted(batch)}")
        return batch[1]

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """The loss to train with, a sum."""
        return self.loss(self.outputs(net, batch), batch)

    def judged(self, net: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Outputs and loss, a sum, of a network in evaluation mode."""
        outputs = self.outputs(net, batch)
        return outputs, self.loss(outputs, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The loss, a sum over the targets."""
        targets = self.targets(batch)
        if self.own_loss is not None:
            return self.own_loss(outputs, targets) * self.count(batch)
        return self._loss(outputs, targets)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Outputs and targets as metrics take them."""
        return outputs.float(), self.targets(batch)


def keywords_of(net: nn.Module) -> set[str] | None:
    """The keywords that a network takes; None where it takes any."""
    parameters = inspect.signature(net.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def taken(batch: Mapping[str, Any], keywords: set[str] | None) -> dict[str, Any]:
    """What a network takes of a batch."""
    return {k: v for k, v in batch.items() if keywords is None or k in keywords}


def main_output(outputs: Any) -> Any:
    """The tensor that matters of what networks of torchvision and transformers give."""
    if isinstance(outputs, Mapping):
        outputs = outputs["out"] if "out" in outputs else outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


class Classification(Task):
    """A class for each example, or for each pixel: cross-entropy."""

    name = "classification"

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            raise TrainingError(
                f"the network gives {_told(outputs)}, expected logits (batch, classes)"
            )
        targets, number = self.targets(batch), outputs.shape[1]
        if self.classes is not None and len(self.classes) != number:
            count = len(self.classes)
            raise TrainingError(
                f"the network tells {number} classes apart, the examples have {count} "
                f"({some(self.classes)}): give it another head, strategy=merge_strategies(["
                f"HeadReplacementStrategy(num_classes={count}), ...])"
            )
        self.number_of_classes = number
        expected = outputs.shape if targets.is_floating_point() else _without_classes(outputs)
        if targets.shape != expected:
            raise TrainingError(
                f"the targets are {_told(targets)} for outputs {_told(outputs)}: expected numbers "
                f"of classes {list(_without_classes(outputs))}, or probabilities "
                f"{list(outputs.shape)}; for other numbers choose task='regression'"
            )
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Numbers of classes must be in range."""
        targets, number = self.targets(batch), self.number_of_classes
        if targets.is_floating_point():
            return
        targets = targets.long()  # as small types have no IGNORED
        wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= number))]
        if len(wrong):
            raise TrainingError(
                f"labels {sorted(set(wrong.tolist()))[:5]} are out of range: the network tells "
                f"{number} classes apart, numbered from 0 to {number - 1}"
            )

    def count(self, batch: Any) -> int:
        """Those that are not to be ignored."""
        targets = self.targets(batch)
        if targets.is_floating_point():
            return targets.numel() // targets.shape[1]
        return int((targets.long() != IGNORED).sum())

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets if targets.is_floating_point() else targets.long()
        return F.cross_entropy(
            _wide(outputs), targets, reduction="sum", label_smoothing=self.smoothing
        )

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Of probabilities, the largest counts."""
        targets = self.targets(batch)
        soft = targets.is_floating_point()
        return outputs.float(), targets.argmax(1) if soft else targets.long()


class Language(Task):
    """The next token at each place of a text: cross-entropy."""

    name = "language"

    def targets(self, batch: Any) -> Any:
        """Of a dictionary, the tokens that follow; of a pair, its second part."""
        if not isinstance(batch, Mapping):
            return batch[1]
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"]
            if (mask := batch.get("attention_mask")) is not None:
                labels = labels.masked_fill(mask == 0, IGNORED)
        return labels[:, 1:]

    def outputs(self, net: Any, batch: Any) -> Any:
        """Logits for the places that have a token after them."""
        outputs = super().outputs(net, batch)
        if not isinstance(batch, Mapping):
            return outputs
        return outputs[:, -batch["input_ids"].shape[1] :][:, :-1]

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() != 3:
            raise TrainingError(
                f"the network gives {_told(outputs)}, expected logits (batch, length, tokens): "
                "is it a language model with its head?"
            )
        self.number_of_classes = outputs.shape[2]
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Tokens must be in the vocabulary."""
        targets = self.targets(batch).long()
        known = targets[targets != IGNORED]
        if len(known) and not 0 <= known.min() <= known.max() < self.number_of_classes:
            raise TrainingError(
                f"there are tokens from {known.min()} to {known.max()}, the network knows those "
                f"from 0 to {self.number_of_classes - 1}: is it the tokenizer of this network?"
            )

    def count(self, batch: Any) -> int:
        """The tokens that have one before them."""
        return int((self.targets(batch).long() != IGNORED).sum())

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            _wide(outputs.flatten(0, 1)),
            targets.flatten().long(),
            reduction="sum",
            label_smoothing=self.smoothing,
        )

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """All places one after the other."""
        return outputs.float().flatten(0, 1), self.targets(batch).long().flatten()


class Regression(Task):
    """Numbers: mean squared error."""

    name = "regression"

    def _fit(self, outputs: Any, batch: Any) -> None:
        targets = self.targets(batch)
        if not isinstance(outputs, Tensor) or outputs.numel() != targets.numel():
            raise TrainingError(
                f"the network gives {_told(outputs)}, the targets are {_told(targets)}: expected "
                "as many"
            )

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        given = _wide(outputs)
        squares = F.mse_loss(given, targets.to(given).view_as(given), reduction="none")
        return squares.flatten(1).mean(1).sum() if squares.dim() > 1 else squares.sum()

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """All numbers in one row."""
        return outputs.float().flatten(), self.targets(batch).float().flatten()


class Detection(Task):
    """Boxes in pictures, by the detectors of torchvision, which compute their losses themselves."""

    name = "detection"
    watch = "map"

    def outputs(self, net: Any, batch: Any) -> Any:
        """A dictionary of boxes, labels and scores for each picture."""
        return net(batch[0])

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """The sum of the losses that the network tells."""
        losses = net(*batch)
        if not isinstance(losses, Mapping):
            raise TrainingError(
                f"the network gives {_told(losses)} in training, expected a dictionary of losses, "
                "as torchvision's detectors give it"
            )
        return torch.stack([_wide(loss) for loss in losses.values()]).sum() * self.count(batch)

    def judged(self, net: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Detections; detectors tell no loss then."""
        return self.outputs(net, batch), None

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """As they are."""
        return outputs, self.targets(batch)


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Language, Regression, Detection)
}


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums of losses need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _without_classes(outputs: Tensor) -> torch.Size:
    return torch.Size([outputs.shape[0], *outputs.shape[2:]])


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return f"a {type(value).__name__}"
