"""What all tasks have in common: `Task`, and small functions on batches and outputs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.core.io_spec import IOSpec
from gift.errors import TrainingError
from gift.support.tensors import dtype_name
from gift.training.drawings import Sample
from gift.training.predictions import Options

Loss = Callable[[Any, Any], Tensor]


class Task:
    """How a network learns from batches; each task is a subclass.

    Losses are sums over the targets that `count` counts, so that batches of any size can be added.

    Args:
        loss: function of outputs and targets that returns a mean; None uses the loss of the task.
        smoothing: share of the target that is spread over all classes.
        classes: names of the classes; None if they are not known.
        details: what else the task must know, see `gift.data.Examples`.
    """

    name: ClassVar[str]
    watch: ClassVar[str] = "loss"

    def __init__(
        self,
        loss: Loss | None = None,
        smoothing: float = 0.0,
        classes: tuple[str, ...] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.own_loss, self.smoothing, self.classes = loss, smoothing, classes
        self.details = dict(details or {})
        self.number_of_classes = len(classes) if classes else 0
        self.keywords: set[str] | None = None
        self.class_weights: Tensor | None = None

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
        return self.learnt_loss(self.outputs(net, batch), batch)

    def learnt_loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of training, which may weigh classes, as a sum over the targets."""
        return self.loss(outputs, batch)

    def judged(self, net: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Return outputs and loss, as a sum, of a network in evaluation mode."""
        outputs = self.outputs(net, batch)
        return outputs, self.loss(outputs, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss, as a sum over the targets."""
        targets = self.targets(batch)
        if self.own_loss is not None:
            return self.own_loss(*self.own_pair(outputs, targets)) * self.count(batch)
        return self._loss(outputs, targets)

    def own_pair(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return outputs and targets in the form that a loss of the user takes."""
        return outputs, targets

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return outputs and targets in the form that metrics take."""
        return outputs.float(), self.targets(batch)

    @classmethod
    def answered(cls, net: nn.Module, batch: Any, known: IOSpec, options: Options) -> Any:
        """Return the outputs of a network for a batch of inputs without targets.

        Args:
            net: the network, in evaluation mode.
            batch: tensors, as the reader collates them.
            known: what is known of inputs and outputs.
            options: options of `gift.training.predict`.
        """
        if isinstance(batch, Mapping):
            return main_output(net(**accepted(batch, keywords_of(net))))
        return main_output(net(batch))

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return what the outputs say of each input, one of `gift.training.predictions`.

        Raises:
            TrainingError: if the outputs do not fit the task.
        """
        raise TrainingError(f"predict has no answer for {cls.name}: call the network itself")

    def drawn(self, outputs: Any, batch: Any, reader: Any) -> list[Sample]:
        """Return drawings of some examples and of the outputs for them, for the report.

        Args:
            outputs: outputs of the network for the batch.
            batch: inputs and targets.
            reader: reader that made the inputs; None if it is not known.
        """
        return []


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


def wide(tensor: Tensor) -> Tensor:
    """Convert to at least float32, which sums of losses need."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sides(tensor: Tensor) -> list[int]:
    """Return the batch size, and the other sizes that are not 1."""
    return [*tensor.shape[:1], *(side for side in tensor.shape[1:] if side != 1)]


def text(value: Any) -> str:
    """Describe a value for errors: dtype and shape of a tensor, else its type."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return f"a {type(value).__name__}"
