"""The teacher of a job."""

from typing import Any

from torch import nn

from gift.data import Examples
from gift.errors import JobError
from gift.jobs.models import Job
from gift.jobs.networks import named_network
from gift.jobs.runs import Run


def job_teacher(job: Job, train: Examples) -> nn.Module | None:
    """Return the network that a job names as teacher; None if it names none.

    Args:
        job: the job.
        train: the training examples, which the teacher must read as the network does.

    Raises:
        JobError: if the teacher is for other classes, or reads its inputs in another way.
    """
    if job.teacher is None:
        return None
    if isinstance(job.teacher, str):
        run = Run(job.teacher)
        net, classes, reader, task = run.network(), run.classes, run.reader, run.task
    else:
        loaded = named_network(
            job.teacher.name, job.teacher.weights, train.task, job.training.seed or 0,
            **job.teacher.options,
        )  # fmt: skip
        net, classes, reader, task = loaded.net, loaded.classes, loaded.reader, loaded.task
    problems = []
    if task != (train.task or task):
        problems.append(f"it is for {task}, the examples are for {train.task}")
    if None not in (classes, train.classes) and classes != train.classes:
        problems.append(f"it knows the classes {list(classes)}, not {list(train.classes)}")  # type: ignore[arg-type]
    if reader is not None and _read(reader) != _read(train.reader):
        problems.append("it reads inputs in another way: another tokenizer, size or normalisation")
    if problems:
        raise JobError("the teacher does not fit the job", problems)
    return net


def _read(reader: Any) -> Any:
    """Return what two readers must have in common."""
    tokenizer = getattr(reader, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer.get_vocab()
    inputs = ("size", "resize", "mean", "std", "rate", "seconds", "features", "numeric",
              "categorical", "extractor")  # fmt: skip
    return {name: getattr(reader, name) for name in inputs if hasattr(reader, name)}
