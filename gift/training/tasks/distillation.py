"""Distillation: learning from the outputs of another network for the same examples."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.data.examples import IGNORED
from gift.errors import TrainingError, closest
from gift.training.tasks.base import Task, keywords_of, text, wide
from gift.training.tasks.classification import Classification, MultiLabel, two_logits
from gift.training.tasks.language import Language
from gift.training.tasks.regression import Regression


class Distillation:
    """A task with a teacher, whose outputs are targets as well.

    The training loss is a mean of the loss of the task and of that of the soft targets of the
    teacher, as in Hinton et al. 2015, https://arxiv.org/abs/1503.02531: the Kullback-Leibler
    divergence of the probabilities at a temperature T, times T². Numbers have the mean squared
    error. The loss of hidden states is added: that of Tung and Mori 2019,
    https://arxiv.org/abs/1907.09682, equation 4, which compares how similar examples are to each
    other, so that layers may have any width.

    Everything else is that of the task.

    Args:
        task: a task that was fitted to the network.
        net: the network that learns.
        teacher: the network to learn from; it is not changed, and put into evaluation mode.
        batch: a batch, to see whether the outputs of both fit.
        weight: weight of the loss of the teacher, from 0 to 1; that of the task is the rest.
        temperature: temperature of probabilities.
        layers: paths of layers of the network, and those of the teacher whose outputs they learn.
        hidden_weight: weight of the loss of hidden states.

    Raises:
        TrainingError: if the two do not fit each other.
    """

    def __init__(
        self,
        task: Task,
        net: nn.Module,
        teacher: nn.Module,
        batch: Any,
        *,
        weight: float,
        temperature: float,
        layers: Mapping[str, str] | None,
        hidden_weight: float,
    ) -> None:
        if not isinstance(task, Classification | MultiLabel | Language | Regression):
            raise TrainingError(f"there is no distillation of {task.name}, only of " + _KINDS)
        self.task, self.net, self.teacher = task, net, teacher
        self.weight, self.temperature = weight, temperature
        self.hidden_weight = hidden_weight
        self.pairs = _layers(net, teacher, layers or {})
        self.of_teacher = copy.copy(task)
        self.of_teacher.keywords = keywords_of(teacher)
        with torch.no_grad():
            outputs, soft = task.outputs(net, batch), self._asked(batch)[0]
        if not isinstance(soft, Tensor) or outputs.shape != soft.shape:
            raise TrainingError(
                f"the teacher gives {text(soft)}, the network {text(outputs)}: expected the same "
                "classes, or tokens of the same tokenizer, from both"
            )

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.task, name)

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """Return the training loss, as a sum over the targets."""
        with _seen([student for student, _ in self.pairs]) as states:
            outputs = self.task.outputs(net, batch)
        soft, known = self._asked(batch)
        total = (1 - self.weight) * self.task.learnt_loss(outputs, batch)
        total = total + self.weight * self._soft_loss(outputs, soft, batch)
        if self.pairs:
            each = [similarity_loss(states[student], known[other]) for student, other in self.pairs]
            hidden = torch.stack(each).mean()
            total = total + self.hidden_weight * hidden * self.task.count(batch)
        return total

    def _asked(self, batch: Any) -> tuple[Any, dict[nn.Module, Tensor]]:
        """Return the outputs and hidden states of the teacher."""
        self.teacher.eval()
        with torch.no_grad(), _seen([teacher for _, teacher in self.pairs]) as states:
            return self.of_teacher.outputs(self.teacher, batch), states

    def _soft_loss(self, outputs: Tensor, soft: Tensor, batch: Any) -> Tensor:
        """Return the loss against the outputs of the teacher, as a sum over the targets."""
        if isinstance(self.task, Regression):
            squares = F.mse_loss(wide(outputs), wide(soft), reduction="none")
            return squares.flatten(1).mean(1).sum() if squares.dim() > 1 else squares.sum()
        scale = self.temperature**2
        if isinstance(self.task, MultiLabel):
            probabilities = (wide(soft) / self.temperature).sigmoid()
            logits = wide(outputs) / self.temperature
            each = F.binary_cross_entropy_with_logits(logits, probabilities, reduction="none")
            least = F.binary_cross_entropy(probabilities, probabilities, reduction="none")
            return scale * (each - least).mean(1).sum()
        if isinstance(self.task, Language):
            outputs, soft = outputs.transpose(1, -1), soft.transpose(1, -1)
        if getattr(self.task, "is_binary", False):
            outputs, soft = two_logits(outputs), two_logits(soft)
        log_p = F.log_softmax(wide(soft) / self.temperature, 1)
        log_q = F.log_softmax(wide(outputs) / self.temperature, 1)
        each = (log_p.exp() * (log_p - log_q)).sum(1)
        targets = self.task.targets(batch)
        if not targets.is_floating_point():
            each = each[targets.long().view(each.shape) != IGNORED]
        return scale * each.sum()


_KINDS = "classification, segmentation, multi_label, regression and language"


def similarity_loss(one: Tensor, other: Tensor) -> Tensor:
    """Return how differently two batches of states find examples similar to each other.

    The states of each example are one vector; the matrix of their products is normalised row by
    row. The loss is the mean squared difference of both matrices.

    Args:
        one: states (batch, ...).
        other: states (batch, ...) of the same examples, of any other size.
    """
    grams = []
    for states in (one, other):
        flat = wide(states).flatten(1)
        grams.append(F.normalize(flat @ flat.T, dim=1))
    return (grams[0] - grams[1]).square().mean()


def _layers(
    net: nn.Module, teacher: nn.Module, paths: Mapping[str, str]
) -> list[tuple[nn.Module, nn.Module]]:
    """Return the layers with these paths, in the network and in the teacher."""
    known = dict(net.named_modules()), dict(teacher.named_modules())
    problems = [
        f"{what} has no layer {path!r}, closest: {closest(path, own)}"
        for pair in paths.items()
        for what, path, own in zip(("the network", "the teacher"), pair, known, strict=True)
        if path not in own
    ]
    if problems:
        raise TrainingError("; ".join(problems))
    return [(known[0][own], known[1][its]) for own, its in paths.items()]


@contextmanager
def _seen(layers: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Context manager that collects the outputs of layers."""
    found: dict[nn.Module, Tensor] = {}

    def hook(layer: nn.Module) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple | list) else output

        return keep

    handles = [layer.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
