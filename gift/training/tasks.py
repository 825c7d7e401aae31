"""What a batch is for each task: its loss, its metrics, and what can be wrong with it."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.data.examples import IGNORED
from gift.errors import GiftWarning, TrainingError, some
from gift.support.tensors import dtype_name

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

    def fit(self, net: nn.Module, batch: Any) -> "Task":
        """Try a batch, see what the network takes and gives; gives the task that it is.

        Raises:
            TrainingError: if the two do not fit each other.
        """
        self.keywords = keywords_of(net)
        self._fit(self.outputs(net, batch), batch)
        return self

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
        if number < 2:
            raise TrainingError(
                f"the network gives {_told(outputs)}, one number where classes need one for each "
                "of them: give it a head with at least 2 outputs (for yes and no as well, with "
                "targets 0 and 1); where the targets are numbers, choose task='regression'"
            )
        self.number_of_classes = number
        expected = outputs.shape if targets.is_floating_point() else _without_classes(outputs)
        if targets.shape != expected:
            raise TrainingError(
                f"the targets are {_told(targets)} for outputs {_told(outputs)}: expected numbers "
                f"of classes {list(_without_classes(outputs))}, or probabilities "
                f"{list(outputs.shape)}; for other numbers choose task='regression'"
                + _advice(targets)
            )
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Numbers of classes must be in range, and probabilities add up to 1."""
        targets, number = self.targets(batch), self.number_of_classes
        if targets.is_floating_point():
            if self.own_loss is None:
                _check_probabilities(targets)
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
        if not isinstance(outputs, Tensor) or _sides(outputs) != _sides(targets):
            raise TrainingError(
                f"the network gives {_told(outputs)}, the targets are {_told(targets)}: expected "
                "as many, in the same order"
            )
        if outputs.is_complex() or targets.is_complex():
            raise TrainingError(
                f"the network gives {_told(outputs)}, the targets are {_told(targets)}: expected "
                "real numbers; torch.view_as_real makes two of a complex one"
            )

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The loss; a column of targets and a row of them are the same."""
        if self.own_loss is not None:
            targets = self.targets(batch).view_as(outputs)
            return self.own_loss(outputs, targets) * self.count(batch)
        return super().loss(outputs, batch)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        given = _wide(outputs)
        squares = F.mse_loss(given, targets.to(given).view_as(given), reduction="none")
        return squares.flatten(1).mean(1).sum() if squares.dim() > 1 else squares.sum()

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """All numbers in one row."""
        return outputs.float().flatten(), self.targets(batch).float().flatten()


class Undecided(Task):
    """Classification or regression: the targets and what the network gives decide.

    Numbers that are not whole, for a network that gives one for each, are those of a regression.
    """

    name = "undecided"

    def fit(self, net: nn.Module, batch: Any) -> Task:
        """The task that fits, which has seen the batch."""
        self.keywords = keywords_of(net)
        outputs, targets = self.outputs(net, batch), self.targets(batch)
        kind = Regression if _is_regression(outputs, targets) else Classification
        if kind is Regression and bool(((targets == 0) | (targets == 1)).all()):
            warnings.warn(
                f"the targets, {_told(targets)}, are taken for numbers to come near to, though "
                "they are all 0 or 1: for two classes give a head with 2 outputs, and whole "
                "numbers (targets.long()); task='regression' says that they are numbers",
                GiftWarning,
                stacklevel=5,
            )
        return kind(self.own_loss, self.smoothing, self.classes).fit(net, batch)


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


def _is_regression(outputs: Any, targets: Any) -> bool:
    """Whether there is one number for each target, and targets are no numbers of classes."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    single = outputs.dim() == 1 or (outputs.dim() > 1 and outputs.shape[1] == 1)
    return single and targets.is_floating_point() and outputs.numel() == targets.numel()


def _sides(tensor: Tensor) -> list[int]:
    """The batch, and the sides of what belongs to each example."""
    return [*tensor.shape[:1], *(side for side in tensor.shape[1:] if side != 1)]


def _advice(targets: Tensor) -> str:
    if targets.is_floating_point() and bool((targets == targets.round()).all()):
        return "; for classes that are written as 1.0, give targets.long()"
    return ""


def _check_probabilities(targets: Tensor) -> None:
    sums = targets.double().sum(1)
    fits = bool((targets >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())
    if not fits and bool(targets.isfinite().all()):
        raise TrainingError(
            f"the targets are {_told(targets)}, with sums from {sums.min():.4g} to "
            f"{sums.max():.4g} for an example: expected probabilities of classes, which add up to "
            "1. For numbers choose task='regression'; for several classes at once, that and "
            "loss=torch.nn.functional.binary_cross_entropy_with_logits"
        )


def _without_classes(outputs: Tensor) -> torch.Size:
    return torch.Size([outputs.shape[0], *outputs.shape[2:]])


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return f"a {type(value).__name__}"
