"""A class for each example or pixel, and several classes at once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.core.io_spec import IOSpec
from gift.data.examples import IGNORED
from gift.errors import TrainingError, some
from gift.training.predictions import Labels, Options, Prediction
from gift.training.tasks.base import Task, text, wide


class Classification(Task):
    """A class for each example or for each pixel, with cross-entropy loss.

    A network with one output, (batch,) or (batch, 1, ...), distinguishes two classes: its output is
    the logit of the second, and the loss is that of ``BCEWithLogitsLoss``.
    """

    name = "classification"
    is_binary = False

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() < 1:
            raise TrainingError(
                f"the network gives {text(outputs)}, expected logits (batch, classes)"
            )
        targets = self.targets(batch)
        single = outputs.dim() == 1 or outputs.shape[1] == 1
        self.is_binary = single and outputs.numel() == targets.numel()
        number = 2 if single else outputs.shape[1]
        if self.classes is not None and len(self.classes) != number:
            count = len(self.classes)
            raise TrainingError(
                f"the network distinguishes {number} classes, the examples have {count} "
                f"({some(self.classes)}): give it another head, strategy=merge_strategies(["
                f"HeadReplacementStrategy(num_classes={count}), ...])"
            )
        if single and not (self.is_binary and _are_binary(targets)):
            raise TrainingError(
                f"the network gives {text(outputs)}, one number, which distinguishes two classes "
                f"with as many targets 0 and 1; the targets are {text(targets)}: for more classes "
                "use a head with as many outputs; if the targets are numbers, choose "
                "task='regression'"
            )
        self.number_of_classes = number
        if not self.is_binary:
            self._check_shape(outputs, targets)
        self.check(batch)

    def _check_shape(self, outputs: Tensor, targets: Tensor) -> None:
        plain = _without_classes(outputs)
        if targets.shape != (outputs.shape if targets.is_floating_point() else plain):
            raise TrainingError(
                f"the targets are {text(targets)} for outputs {text(outputs)}: expected numbers "
                f"of classes {list(plain)}, or probabilities "
                f"{list(outputs.shape)}; for other numbers choose task='regression'"
                + _advice(targets)
            )

    def check(self, batch: Any) -> None:
        """Check that class numbers are in range, or that probabilities add up to 1."""
        targets, number = self.targets(batch), self.number_of_classes
        if self.is_binary:
            if not _are_binary(targets):
                raise TrainingError(
                    f"the targets are {text(targets)}, expected 0 and 1 for a network with one "
                    "output; if they are numbers, choose task='regression'"
                )
            return
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
        if targets.is_floating_point() and not self.is_binary:
            return targets.numel() // targets.shape[1]
        return int((targets.long() != IGNORED).sum())

    def own_pair(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """With one output, targets are numbers of the same shape, as losses of torch take them."""
        return (
            (outputs, targets.to(outputs).view_as(outputs))
            if self.is_binary
            else (
                outputs,
                targets,
            )
        )

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._weighted(outputs, targets, None)

    def _weighted(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        outputs, targets = self._pair(outputs, targets)
        logits = wide(outputs)
        weights = None if weights is None else weights.to(logits)
        return F.cross_entropy(
            logits, targets, weights, reduction="sum", label_smoothing=self.smoothing
        )

    def learnt_loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of training, as a sum, with weights of classes if there are any."""
        if self.class_weights is None:
            return self.loss(outputs, batch)
        return self._weighted(outputs, self.targets(batch), self.class_weights)

    def _pair(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of all classes, and targets for them."""
        if not self.is_binary:
            return outputs, targets if targets.is_floating_point() else targets.long()
        outputs = two_logits(outputs)
        return outputs, targets.long().view(_without_classes(outputs))

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return outputs and targets for metrics; probabilities become the most probable class."""
        outputs, targets = self._pair(outputs.float(), self.targets(batch))
        return outputs, targets.argmax(1) if targets.is_floating_point() else targets

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the probability of each class; one output is the logit of the second class."""
        if isinstance(outputs, Tensor) and (outputs.dim() == 1 or outputs.shape[1:] == (1,)):
            outputs = two_logits(outputs)
        labels = named_outputs(outputs, known)
        found = []
        for item, row in zip(items, outputs.cpu().double().softmax(1).tolist(), strict=True):
            share = max(row)
            named = dict(zip(labels, row, strict=True))
            found.append(Prediction(item, labels[row.index(share)], share, named, options.top or 1))
        return found


def named_outputs(outputs: Any, known: IOSpec) -> Sequence[str | int]:
    """Return the name of each output (batch, classes), or its number.

    Raises:
        TrainingError: if the outputs are something else, or of another number of classes.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TrainingError(f"the network gives {shape}, expected logits (batch, classes)")
    count = outputs.shape[1]
    if known.classes is not None and len(known.classes) != count:
        raise TrainingError(
            f"the network distinguishes {count} classes, but {len(known.classes)} are named: give "
            "predict(..., classes=...)"
        )
    return range(count) if known.classes is None else known.classes


def two_logits(outputs: Tensor) -> Tensor:
    """Return the logits of two classes, (batch, 2, ...), for one logit, that of the second.

    The softmax of (0, z) is the sigmoid of z.
    """
    column = outputs.unsqueeze(1) if outputs.dim() == 1 else outputs
    return torch.cat([torch.zeros_like(column), column], 1)


class MultiLabel(Task):
    """Any number of classes for each example, with the binary cross-entropy, the mean over classes.

    Targets are zeros and ones (batch, classes).
    """

    name = "multi_label"

    def _fit(self, outputs: Any, batch: Any) -> None:
        targets = self.targets(batch)
        if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
            more = ""
            if self.classes is not None:
                more = (
                    f"; there are {len(self.classes)} classes: give the network another head, "
                    f"HeadReplacementStrategy(num_classes={len(self.classes)})"
                )
            raise TrainingError(
                f"the network gives {text(outputs)}, the targets are {text(targets)}: expected a "
                f"logit and a 0 or 1 for each class, (batch, classes){more}"
            )
        self.number_of_classes = outputs.shape[1]
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Check that all targets are 0 or 1."""
        targets = self.targets(batch)
        if not _are_binary(targets, ignored=False):
            raise TrainingError(
                f"the targets are {text(targets)}, expected 0 and 1: whether an example is of a "
                "class"
            )

    def own_pair(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Targets are numbers, as losses of torch take them."""
        return outputs, targets.to(outputs)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._weighted(outputs, targets, None)

    def _weighted(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        targets = targets.to(torch.float32) * (1 - self.smoothing) + self.smoothing / 2
        logits = wide(outputs)
        weights = None if weights is None else weights.to(logits)
        each = F.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=weights
        )
        return each.mean(1).sum()

    def learnt_loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of training, as a sum, with weights of classes if there are any."""
        if self.class_weights is None:
            return self.loss(outputs, batch)
        return self._weighted(outputs, self.targets(batch), self.class_weights)

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return probabilities, and targets as whole numbers."""
        return outputs.float().sigmoid(), self.targets(batch).long()

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the classes whose probability is at least the threshold."""
        labels = named_outputs(outputs, known)
        least = 0.5 if options.threshold is None else options.threshold
        found = []
        for item, row in zip(items, outputs.cpu().double().sigmoid().tolist(), strict=True):
            named = dict(zip(labels, row, strict=True))
            best = sorted((n for n in named if named[n] >= least), key=lambda n: -named[n])
            found.append(Labels(item, best[: options.top], named))
        return found


def _are_binary(targets: Tensor, ignored: bool = True) -> bool:
    fits = (targets == 0) | (targets == 1)
    if ignored and not targets.is_floating_point():
        fits |= targets.long() == IGNORED
    return bool(fits.all())


def _advice(targets: Tensor) -> str:
    if targets.is_floating_point() and bool((targets == targets.round()).all()):
        return "; for classes that are written as 1.0, give targets.long()"
    return ""


def _check_probabilities(targets: Tensor) -> None:
    sums = targets.double().sum(1)
    fits = bool((targets >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())
    if not fits and bool(targets.isfinite().all()):
        raise TrainingError(
            f"the targets are {text(targets)}, with sums from {sums.min():.4g} to "
            f"{sums.max():.4g} for an example: expected probabilities of classes, which add up to "
            "1. For numbers choose task='regression'; for several classes at once, "
            "task='multi_label'"
        )


def _without_classes(outputs: Tensor) -> torch.Size:
    return torch.Size([outputs.shape[0], *outputs.shape[2:]])
