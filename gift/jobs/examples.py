"""The examples of a job."""

import dataclasses
import inspect
from typing import Any

import gift.data
from gift.data.examples import Examples
from gift.errors import JobError
from gift.jobs.errors import hint
from gift.jobs.kinds import KINDS
from gift.jobs.models import Data


def job_examples(
    data: Data, reader: Any, seed: int = 0
) -> tuple[Examples, Examples | None, Examples | None]:
    """Return the training, validation and old-task examples of a job.

    Args:
        data: data section of the job.
        reader: see `job_reader`.
        seed: seed of the random choice of held-out examples.
    """
    train = read_examples(data, data.train, reader, learnt=True)
    reader = train.reader if reader is None else reader
    valid = old = None
    if data.valid is not None:
        valid = read_examples(data, data.valid, reader, train.classes)
    elif data.valid_share is not None:
        train, valid = train.split(data.valid_share, seed)
    if data.old is not None:
        old = read_examples(data, data.old, reader, own_classes=True)
    return train, valid, old


def job_reader(data: Data, reader: Any) -> Any:
    """Return the reader of inputs: the network's reader with the settings of the job.

    Args:
        data: data section of the job.
        reader: reader of the network; None creates one.

    Returns:
        None if the training examples make it.

    Raises:
        JobError: if the two do not fit.
    """
    readers = KINDS[data.kind].readers
    if not readers:
        return None
    settings = dict(data.reader)
    if "size" in settings:  # do not crop from the old resize
        settings.setdefault("resize", None)
    if reader is None:
        made = getattr(gift.data, readers[0])
        own = [f for f in dataclasses.fields(made) if f.init]
        missing = [f.name for f in own if f.default is dataclasses.MISSING]
        if missing := [name for name in missing if name not in settings]:
            what = "the network has no reader for its inputs"
            raise JobError(what, [f"data.reader: give {' and '.join(missing)}"])
        return made(**settings)
    known = [field.name for field in dataclasses.fields(reader) if field.init]
    wrong = [f"data.reader: there is no {n!r}, {hint(n, known)}" for n in settings.keys() - known]
    if wrong:
        raise JobError(f"data.reader does not fit the network's {type(reader).__name__}", wrong)
    return dataclasses.replace(reader, **settings)


def read_examples(
    data: Data,
    place: Any,
    reader: Any,
    classes: tuple[str, ...] | None = None,
    learnt: bool = False,
    own_classes: bool = False,
) -> Examples:
    """Read the examples in one place.

    Args:
        data: data section of the job.
        place: place of the examples.
        reader: see `job_reader`.
        classes: names of the classes, if they are already known.
        learnt: whether they are training examples, which are augmented if the job says so.
        own_classes: whether to ignore the classes in the options, because these examples have
            others.
    """
    kind = KINDS[data.kind]
    options, own = dict(data.options), kind.keywords(place)
    if own_classes:
        options.pop("classes", None)
    keywords = options | own
    takes = inspect.signature(kind.function).parameters
    if "augment" in takes and not learnt:
        keywords["augment"] = False
    if "classes" in takes and classes is not None:
        keywords["classes"] = classes
    if "reader" in takes:
        keywords["reader"] = reader
    return kind.function(**keywords)
