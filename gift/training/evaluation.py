"""Evaluation: the loss and metrics of a network on examples."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gift.core.frozen_norms import kept_modes
from gift.core.io_spec import io_spec_of
from gift.data.examples import Examples
from gift.errors import GiftWarning, TrainingError, some
from gift.support.progress import slow
from gift.training.distributed import Processes
from gift.training.drawings import Sample
from gift.training.finite import describe_not_finite, rows_not_finite
from gift.training.loading import Batches, examples_of
from gift.training.metrics import MetricKind, confusion_matrix, metrics_of, scalars
from gift.training.run import VALID, TrainingRun
from gift.training.settings import Settings
from gift.training.tasks import TASKS, Classification, Distillation, Task, Undecided

LARGEST_CONFUSION = 1000


def evaluate(
    net: nn.Module,
    examples: Any,
    *,
    task: str | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> dict[str, float]:
    """Compute the loss and metrics of a network on examples, without changing training modes.

    Args:
        net: the network, fine-tuned or not.
        examples: as for `finetune`.
        task: task of the examples, if they do not specify it themselves.
        metrics: names of metrics, see `gift.training.METRICS`; None selects those of the task.
        batch_size: number of examples in a batch.
        device: "auto", or a torch device; the network is moved there.

    Raises:
        TrainingError: if examples and network do not fit each other.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift.training import evaluate
        >>> net = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.eye(2)), net.bias.zero_()
        >>> inputs = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0], [1.0, 2.0]])
        >>> found = evaluate(net, (inputs, torch.tensor([0, 1, 0, 0])), metrics=["accuracy"])
        >>> found["accuracy"]
        0.75
    """
    settings = Settings(device=device, batch_size=batch_size)
    processes = Processes(settings)
    data = examples_of(examples, task)
    work = task_of(data, task, io_spec_of(net).details)
    net.to(processes.device)
    batches = Batches(data, batch_size, processes)
    work = rehearse(net, work, batches)
    kinds = metrics_of(work.name, metrics)
    return judge(net, work, batches, kinds, in_detail=work.name == "detection")[0]


def task_of(data: Any, name: str | None, details: Mapping[str, Any], **options: Any) -> Task:
    """Return the task of the given name, else that of the examples, else `Undecided`.

    Args:
        data: what `examples_of` returns.
        name: name of the task.
        details: what the task must know, see `gift.data.Examples`.
        options: further arguments of the task.

    Raises:
        TrainingError: if there is no such task.
    """
    own = isinstance(data, Examples)
    if own and name is None:
        name = data.task or (None if data.classes is None else "classification")
    if name is not None and name not in TASKS:
        raise TrainingError(f"the task is {name!r}, expected one of {sorted(TASKS)}")
    return (Undecided if name is None else TASKS[name])(
        classes=data.classes if own else None, details=details, **options
    )


def rehearse(net: nn.Module, task: Task, batches: Batches, what: str = "the examples") -> Task:
    """Run the network on a first batch, and let the task check its outputs and targets.

    Returns the task, which may have been undecided before. If the examples are tensors, those with
    non-finite values are tried as well.

    Raises:
        TrainingError: if network and examples do not fit each other.
    """
    batch, _ = next(iter(batches.of()))
    with kept_modes(net), torch.no_grad():
        net.eval()
        try:
            task = task.fit(net, batches.on_device(batch))
        except RuntimeError as error:
            _note_features(error, batches.data)
            raise
        # A custom loss may ignore missing values.
        odd = rows_not_finite(batches.data)[: batches.batch_size] if not task.own_loss else []
        if odd:
            batch = batches.collated(odd)
            task.check(batch)
            _, loss = task.judged(net, batches.on_device(batch))
            if loss is None or not bool(loss.isfinite()):
                raise TrainingError(f"{what}: {describe_not_finite(batch, odd)}")
    return task


def _note_features(error: Exception, data: Any) -> None:
    """Add the names of the inputs to an error, since a network must have as many."""
    names = getattr(getattr(data, "reader", None), "features", None)
    if names:
        error.add_note(f"an example has {len(names)} inputs: {some(names, 20)}")


def judge(
    net: nn.Module,
    task: Task,
    batches: Batches,
    kinds: Mapping[str, MetricKind],
    *,
    in_detail: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
    what: str = "the examples",
    see: Callable[[Any, Any, Any], None] = lambda *_: None,
) -> tuple[dict[str, float], list[list[int]] | None]:
    """Compute loss and metrics on batches; in detail also the confusion matrix and AP by class.

    `see` is called with the places of the examples of each batch, the outputs, and the batch.

    Raises:
        TrainingError: if the loss is not finite because examples have non-finite values; the error
            names the first of these examples.
    """
    processes, number = batches.processes, task.number_of_classes
    makers = {name: kind.make for name, kind in kinds.items()}
    if in_detail and isinstance(plain_task(task), Classification) and number <= LARGEST_CONFUSION:
        makers["confusion"] = confusion_matrix
    # The process group may have been started for something other than training.
    options = {"sync_on_compute": processes.number > 1}
    metrics = {n: make(number, **options).to(processes.device) for n, make in makers.items()}
    total = torch.zeros((), dtype=torch.float64)
    count, has_loss = 0, False
    processes.agree_on_buffers(net)
    places = batches.places()
    with kept_modes(net), torch.no_grad(), autocast or nullcontext():
        net.eval()
        shown = slow(batches.of(), "evaluating", len(places))
        for number, (batch, counts) in enumerate(shown):
            task.check(batch)
            moved = batches.on_device(batch)
            outputs, loss = task.judged(net, moved)
            has_loss = loss is not None
            if loss is None or not math.isfinite(loss):
                reason = describe_not_finite(batch, places[number], number)
                if reason:
                    raise TrainingError(f"{what}: {reason}")
            if not counts:
                continue
            count += task.count(batch)
            see(places[number], outputs, moved)
            for metric in metrics.values():
                metric.update(*task.shown(outputs, moved))
            if loss is not None:
                total += loss.cpu().double()
    processes.reshard(net)
    found = {name: metric.compute() for name, metric in metrics.items()}
    matrix = found.pop("confusion", None)
    values = {"loss": processes.sum(total) / max(processes.sum(count), 1)} if has_loss else {}
    if has_loss and not math.isfinite(values["loss"]):
        warnings.warn(
            f"the loss on {what} is not finite, though their numbers are: the network's are not, "
            "or too large for its precision",
            GiftWarning,
            stacklevel=2,
        )
    for name, value in found.items():
        parts = scalars(name, value, task.classes, in_detail)
        # computed in float32, whose further digits carry no information
        values |= {key: float(f"{part:.7g}") for key, part in parts.items()}
    return values, None if matrix is None else matrix.tolist()


def judge_valid(
    run: TrainingRun,
    in_detail: bool = False,
    see: Callable[[Any, Any, Any], None] = lambda *_: None,
) -> tuple[dict[str, float], list[list[int]] | None]:
    """Compute loss and metrics on the validation examples of a run, which must have some.

    Args:
        run: the run.
        in_detail: as for `judge`.
        see: as for `judge`.
    """
    assert run.valid is not None
    return judge(
        run.net,
        run.task,
        run.valid,
        run.metrics,
        in_detail=in_detail,
        autocast=run.autocast(),
        what=VALID,
        see=see,
    )


def plain_task(task: Task | Distillation) -> Task:
    """Return the task itself, if it has a teacher."""
    return task.task if isinstance(task, Distillation) else task


def drawings(net: nn.Module, task: Task, batches: Batches, number: int = 8) -> list[Sample]:
    """Return drawings of some examples, evenly spread, and of what the network says of them.

    Args:
        net: the network.
        task: the task.
        batches: batches of examples; those of a data loader are not drawn.
        number: largest number of drawings.
    """
    data, task = batches.data, plain_task(task)
    if not isinstance(data, Examples) or type(task).drawn is Task.drawn or not len(data):
        return []
    count = min(number, len(data))
    places = [place * len(data) // count for place in range(count)]
    batch = batches.collated(places)
    with kept_modes(net), torch.no_grad():
        net.eval()
        moved = batches.on_device(batch)
        outputs, _ = task.judged(net, moved)
        return task.drawn(outputs, moved, data.reader)
