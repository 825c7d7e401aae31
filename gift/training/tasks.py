"""The tasks: how each computes its loss and metrics from a batch, and how it checks batches."""

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
    """How a network learns from batches; each task is a subclass.

    Losses are sums over the targets that `count` counts, so that batches of any size can be added.

    Args:
        loss: function of outputs and targets that returns a mean; None uses the loss of the task.
        smoothing: share of the target that is spread over all classes.
        classes: names of the classes; None if they are not known.
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
        """Run the network on a batch, check its outputs, and return the task to train with.

        Raises:
            TrainingError: if network and batch do not fit each other.
        """
        self.keywords = keywords_of(net)
        self._fit(self.outputs(net, batch), batch)
        return self

    def _fit(self, outputs: Any, batch: Any) -> None:
        """Check that the outputs fit the targets."""

    def check(self, batch: Any) -> None:
        """Check the targets, before they are moved to a device.

        Raises:
            TrainingError: if they are not valid targets.
        """

    def count(self, batch: Any) -> int:
        """Return the number of targets in a batch."""
        return len(self.targets(batch))

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return the outputs of the network."""
        if isinstance(batch, Mapping):
            known = {k: v for k, v in batch.items() if k not in ("labels", "label")}
            return main_output(net(**accepted(known, self.keywords)))
        return main_output(net(batch[0]))

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch."""
        if isinstance(batch, Mapping):
            for name in ("labels", "label"):
                if name in batch:
                    return batch[name]
            raise TrainingError(f"the examples have no 'labels', but {sorted(batch)}")
        return batch[1]

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """Return the training loss, as a sum."""
        return self.loss(self.outputs(net, batch), batch)

    def judged(self, net: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Return outputs and loss, as a sum, of a network in evaluation mode."""
        outputs = self.outputs(net, batch)
        return outputs, self.loss(outputs, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss, as a sum over the targets."""
        targets = self.targets(batch)
        if self.own_loss is not None:
            return self.own_loss(outputs, targets) * self.count(batch)
        return self._loss(outputs, targets)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return outputs and targets in the form that metrics take."""
        return outputs.float(), self.targets(batch)


def keywords_of(net: nn.Module) -> set[str] | None:
    """Return the keywords that a network takes; None if it takes any."""
    parameters = inspect.signature(net.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def accepted(batch: Mapping[str, Any], keywords: set[str] | None) -> dict[str, Any]:
    """Select the entries of a batch that a network takes."""
    return {k: v for k, v in batch.items() if keywords is None or k in keywords}


def main_output(outputs: Any) -> Any:
    """Return the main tensor of the outputs of torchvision and transformers networks."""
    if isinstance(outputs, Mapping):
        outputs = outputs["out"] if "out" in outputs else outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


class Classification(Task):
    """A class for each example or for each pixel, with cross-entropy loss."""

    name = "classification"

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            raise TrainingError(
                f"the network gives {_text(outputs)}, expected logits (batch, classes)"
            )
        targets, number = self.targets(batch), outputs.shape[1]
        if self.classes is not None and len(self.classes) != number:
            count = len(self.classes)
            raise TrainingError(
                f"the network distinguishes {number} classes, the examples have {count} "
                f"({some(self.classes)}): give it another head, strategy=merge_strategies(["
                f"HeadReplacementStrategy(num_classes={count}), ...])"
            )
        if number < 2:
            raise TrainingError(
                f"the network gives {_text(outputs)}, one number, but classes need one each: use a "
                "head with at least 2 outputs (for yes and no as well, with targets 0 and 1); if "
                "the targets are numbers, choose task='regression'"
            )
        self.number_of_classes = number
        expected = outputs.shape if targets.is_floating_point() else _without_classes(outputs)
        if targets.shape != expected:
            raise TrainingError(
                f"the targets are {_text(targets)} for outputs {_text(outputs)}: expected numbers "
                f"of classes {list(_without_classes(outputs))}, or probabilities "
                f"{list(outputs.shape)}; for other numbers choose task='regression'"
                + _advice(targets)
            )
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Check that class numbers are in range, or that probabilities add up to 1."""
        targets, number = self.targets(batch), self.number_of_classes
        if targets.is_floating_point():
            if self.own_loss is None:
                _check_probabilities(targets)
            return
        targets = targets.long()  # small integer types cannot hold IGNORED
        wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= number))]
        if len(wrong):
            raise TrainingError(
                f"labels {sorted(set(wrong.tolist()))[:5]} are out of range: the network "
                f"distinguishes {number} classes, numbered from 0 to {number - 1}"
            )

    def count(self, batch: Any) -> int:
        """Count the targets that are not ignored."""
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
        """Return outputs and targets for metrics; probabilities become the most probable class."""
        targets = self.targets(batch)
        soft = targets.is_floating_point()
        return outputs.float(), targets.argmax(1) if soft else targets.long()


class Language(Task):
    """The next token at each position of a text, with cross-entropy loss."""

    name = "language"

    def targets(self, batch: Any) -> Any:
        """Return the next tokens of a dictionary, or the second part of a pair."""
        if not isinstance(batch, Mapping):
            return batch[1]
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"]
            if (mask := batch.get("attention_mask")) is not None:
                labels = labels.masked_fill(mask == 0, IGNORED)
        return labels[:, 1:]

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return the logits at the positions that are followed by a token."""
        outputs = super().outputs(net, batch)
        if not isinstance(batch, Mapping):
            return outputs
        return outputs[:, -batch["input_ids"].shape[1] :][:, :-1]

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() != 3:
            raise TrainingError(
                f"the network gives {_text(outputs)}, expected logits (batch, length, tokens): "
                "is it a language model with its head?"
            )
        self.number_of_classes = outputs.shape[2]
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Check that the tokens are in the vocabulary."""
        targets = self.targets(batch).long()
        known = targets[targets != IGNORED]
        if len(known) and not 0 <= known.min() <= known.max() < self.number_of_classes:
            raise TrainingError(
                f"there are tokens from {known.min()} to {known.max()}, the network knows those "
                f"from 0 to {self.number_of_classes - 1}: is it the tokenizer of this network?"
            )

    def count(self, batch: Any) -> int:
        """Count the tokens that are predicted, those with a token before them."""
        return int((self.targets(batch).long() != IGNORED).sum())

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            _wide(outputs.flatten(0, 1)),
            targets.flatten().long(),
            reduction="sum",
            label_smoothing=self.smoothing,
        )

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Flatten all positions into one sequence."""
        return outputs.float().flatten(0, 1), self.targets(batch).long().flatten()


class Regression(Task):
    """Numbers, with mean squared error."""

    name = "regression"

    def _fit(self, outputs: Any, batch: Any) -> None:
        targets = self.targets(batch)
        if not isinstance(outputs, Tensor) or _sides(outputs) != _sides(targets):
            raise TrainingError(
                f"the network gives {_text(outputs)}, the targets are {_text(targets)}: expected "
                "as many, in the same order"
            )
        if outputs.is_complex() or targets.is_complex():
            raise TrainingError(
                f"the network gives {_text(outputs)}, the targets are {_text(targets)}: expected "
                "real numbers; torch.view_as_real makes two of a complex one"
            )

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss; targets may be a column or a row."""
        if self.own_loss is not None:
            targets = self.targets(batch).view_as(outputs)
            return self.own_loss(outputs, targets) * self.count(batch)
        return super().loss(outputs, batch)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        given = _wide(outputs)
        squares = F.mse_loss(given, targets.to(given).view_as(given), reduction="none")
        return squares.flatten(1).mean(1).sum() if squares.dim() > 1 else squares.sum()

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Flatten all numbers into one sequence."""
        return outputs.float().flatten(), self.targets(batch).float().flatten()


class Undecided(Task):
    """Classification or regression, decided by the targets and the outputs of the network.

    Floating-point targets with one output for each of them mean regression.
    """

    name = "undecided"

    def fit(self, net: nn.Module, batch: Any) -> Task:
        """Return the task that fits the batch, already fitted to it."""
        self.keywords = keywords_of(net)
        outputs, targets = self.outputs(net, batch), self.targets(batch)
        kind = Regression if _is_regression(outputs, targets) else Classification
        if kind is Regression and bool(((targets == 0) | (targets == 1)).all()):
            warnings.warn(
                f"the targets, {_text(targets)}, are treated as numbers to predict, though they "
                "are all 0 or 1: for two classes, use a head with 2 outputs and integer targets "
                "(targets.long()); task='regression' confirms that they are numbers",
                GiftWarning,
                stacklevel=5,
            )
        return kind(self.own_loss, self.smoothing, self.classes).fit(net, batch)


class Detection(Task):
    """Boxes in images, for torchvision detectors, which compute their losses themselves."""

    name = "detection"
    watch = "map"

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return a dictionary of boxes, labels and scores for each image."""
        return net(batch[0])

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """Return the sum of the losses that the network returns."""
        losses = net(*batch)
        if not isinstance(losses, Mapping):
            raise TrainingError(
                f"the network gives {_text(losses)} in training, expected a dictionary of losses, "
                "as torchvision's detectors give it"
            )
        return torch.stack([_wide(loss) for loss in losses.values()]).sum() * self.count(batch)

    def judged(self, net: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Return the detections; detectors return no loss in evaluation mode."""
        return self.outputs(net, batch), None

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return outputs and targets unchanged."""
        return outputs, self.targets(batch)


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Language, Regression, Detection)
}


def _wide(tensor: Tensor) -> Tensor:
    """Convert to at least float32, which sums of losses need."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_regression(outputs: Any, targets: Any) -> bool:
    """Whether there is one output for each target, and the targets are not class numbers."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    single = outputs.dim() == 1 or (outputs.dim() > 1 and outputs.shape[1] == 1)
    return single and targets.is_floating_point() and outputs.numel() == targets.numel()


def _sides(tensor: Tensor) -> list[int]:
    """Return the batch size, and the other sizes that are not 1."""
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
            f"the targets are {_text(targets)}, with sums from {sums.min():.4g} to "
            f"{sums.max():.4g} for an example: expected probabilities of classes, which add up to "
            "1. For numbers choose task='regression'; for several classes at once, that and "
            "loss=torch.nn.functional.binary_cross_entropy_with_logits"
        )


def _without_classes(outputs: Tensor) -> torch.Size:
    return torch.Size([outputs.shape[0], *outputs.shape[2:]])


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return f"a {type(value).__name__}"
