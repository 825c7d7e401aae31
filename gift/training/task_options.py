"""What the settings ask of tasks and batches: weights, difficulties, teachers."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from gift.core.frozen_norms import kept_modes
from gift.core.trained import named_trainable
from gift.errors import TrainingError
from gift.training.balance import class_weights, difficulties, example_weights
from gift.training.loading import Batches
from gift.training.settings import Settings, Settled, settled
from gift.training.tasks import Distillation, Task


def settled_for(net: nn.Module, settings: Settings, task: Task, steps: int) -> Settled:
    """Return the settings with epochs and a learning rate, by the network and its examples.

    Args:
        net: the network, with what is trained in it.
        settings: settings as given.
        task: the task.
        steps: number of optimizer steps of an epoch.
    """
    trained = sum(p.numel() for _, p in named_trainable(net))
    total = sum(p.numel() for _, p in net.named_parameters())
    is_transformer = hasattr(getattr(net, "config", None), "model_type")
    return settled(settings, task.name, steps, trained, total, is_transformer)


def with_options(
    batches: Batches, task: Task, net: nn.Module, settings: Settled, teacher: nn.Module | None
) -> Task:
    """Give a task weights of classes and a teacher, and batches weights and difficulties.

    Args:
        batches: batches of the training examples.
        task: a task that was fitted to the network.
        net: the network as it is.
        settings: settings of the training.
        teacher: the network to learn from, if there is one.

    Returns:
        The task to train with.

    Raises:
        TrainingError: if the examples have no classes or no difficulties, or the teacher does not
            fit.
    """
    number = task.number_of_classes
    if settings.balance == "weights":
        if task.own_loss is not None:
            raise TrainingError("balance='weights' weighs the loss of the task, not your own loss")
        task.class_weights = class_weights(batches.data, task.name, number)
    elif settings.balance == "sampler":
        batches.weights = example_weights(batches.data, task.name, number)
    if settings.curriculum is not None:
        difficulty = difficulties(
            batches.data, settings.curriculum, lambda: _losses(batches, task, net)
        )
        batches.curriculum = difficulty, max(1, settings.epochs // 2)
    return task if teacher is None else with_teacher(batches, task, net, teacher, settings)


def with_teacher(
    batches: Batches, task: Task, net: nn.Module, teacher: nn.Module, settings: Settled
) -> Task:
    """Return the task with a teacher, which is moved to the device of the network.

    Raises:
        TrainingError: if network and teacher do not fit each other.
    """
    if not isinstance(teacher, nn.Module):
        raise TrainingError(f"the teacher is a {type(teacher).__name__}, expected a network")
    teacher.to(batches.processes.device)
    batch, _ = next(iter(batches.of()))
    with kept_modes(net):
        net.eval()
        made: Any = Distillation(
            task,
            net,
            teacher,
            batches.on_device(batch),
            weight=settings.distill_weight,
            temperature=settings.distill_temperature,
            layers=settings.distill_layers,
            hidden_weight=settings.distill_hidden_weight,
        )
    return cast(Task, made)  # it has all of a task


def _losses(batches: Batches, task: Task, net: nn.Module) -> Tensor:
    """Return the loss of each example, of the network as it is."""
    found = []
    with kept_modes(net), torch.no_grad():
        net.eval()
        for place in range(len(batches.data)):
            batch = batches.collated([place])
            task.check(batch)
            _, loss = task.judged(net, batches.on_device(batch))
            if loss is None:
                raise TrainingError(f"curriculum='loss': {task.name} has no loss in evaluation")
            found.append(loss.cpu().double() / max(task.count(batch), 1))
    return torch.stack(found)
