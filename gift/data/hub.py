"""Hugging Face datasets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gift.data.classes import classes_of, numbers_of
from gift.data.examples import Examples, Reader
from gift.data.reading import read_examples
from gift.data.targets import SEPARATOR, Targets, targets_of
from gift.errors import DataError, refuse
from gift.support.optional import require


class Columns:
    """Inputs and class numbers from a Hugging Face dataset.

    Args:
        dataset: the dataset.
        inputs: names of the input columns.
        labels: target of each row.
    """

    def __init__(self, dataset: Any, inputs: tuple[str, ...], labels: list[Any]) -> None:
        self.dataset, self.inputs, self.labels = dataset, inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        try:
            row = self.dataset[place]
        except Exception as error:  # a damaged image can make a decoder raise anything
            raise DataError(f"row {place} cannot be read: {error}") from error
        values = tuple(row[name] for name in self.inputs)
        return values if len(values) > 1 else values[0], self.labels[place]


def hugging_face(
    dataset: Any,
    reader: Reader,
    split: str | None = "train",
    subset: str | None = None,
    input: str | None = None,
    label: str | None = None,
    pair: str | None = None,
    classes: Sequence[str] | None = None,
    augment: bool = False,
    task: str = "classification",
    standardise: bool = True,
) -> Examples:
    """Load a Hugging Face dataset of images or texts and their classes or numbers.

    Args:
        dataset: the dataset, all its splits, its name on the hub, or a folder of ``save_to_disk``.
        reader: converts inputs: `PictureReader` or `TextReader`.
        split: name of the split; None if the dataset is a single split.
        subset: name of the subset, if the dataset has several.
        input: column of the images or texts; None uses the only such column.
        label: column of the classes or numbers; None uses the only column of that kind.
        pair: column of second texts, for tasks on pairs of texts.
        classes: names of the classes in the order of their numbers, `train.classes` for
            validation; None uses those of the dataset.
        augment: crop and flip images at random, for training.
        task: "classification"; "regression" for a column of numbers; or "multi_label" for one with
            a list of classes in each row.
        standardise: for "regression", whether the network predicts numbers of mean 0 and standard
            deviation 1. Metrics and predictions are in the units of the column.

    Raises:
        DataError: if there is no such dataset, split or column, or naming all rows without a
            class.
    """
    data = _part(_loaded(dataset, split, subset), split)
    features = data.features
    label = label or _only(features, *_IS_LABEL.get(task, ("classes", _is_class)))
    input = input or _only(features, "inputs", _is_input, "input", but=(label, pair))
    inputs = (input,) if pair is None else (input, pair)
    missing = [name for name in (*inputs, label) if name not in features]
    refuse(
        DataError,
        "hugging_face",
        [f"there is no column {n!r}, only {sorted(features)}" for n in missing],
    )
    if task in ("classification", "contrastive"):
        names, numbers = _numbered(data, label, classes)
        targets = Targets(task, numbers, names)
    else:
        targets = _targets(list(data[label]), features[label], label, task, classes, standardise)
    source = Columns(data.select_columns(list(inputs)), inputs, targets.values)
    return targets.of(read_examples(source, reader, augment))


def _loaded(dataset: Any, split: str | None, subset: str | None) -> Any:
    if not isinstance(dataset, str | Path):
        return dataset
    datasets = require("datasets", "datasets")
    marks = ("dataset_info.json", "dataset_dict.json")
    script = Path(dataset) / f"{Path(dataset).name}.py"
    if Path(dataset).suffix == ".py" or script.is_file():
        raise DataError(f"the data set {str(dataset)!r} is a script, which is not run")
    try:
        if any((Path(dataset) / mark).is_file() for mark in marks):
            return datasets.load_from_disk(str(dataset))
        return datasets.load_dataset(str(dataset), subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the data set {str(dataset)!r} cannot be loaded; where it cannot be fetched, give a "
            f"folder that save_to_disk wrote ({type(error).__name__}: {error})"
        ) from error


def _part(data: Any, split: str | None) -> Any:
    """Select a split of a dataset with several; a single split is returned as it is."""
    if hasattr(data, "features"):
        if not hasattr(data, "__len__"):
            raise DataError("the data set is a stream without a length: load it without streaming")
        return data
    if not hasattr(data, "keys"):
        raise DataError(
            f"expected a data set of Hugging Face, its name or folder, got a {type(data).__name__}"
        )
    if split not in data:
        raise DataError(f"the data set has the splits {sorted(data)}, not {split!r}")
    return data[split]


def _is_class(feature: Any) -> bool:
    return hasattr(feature, "names")


def _is_number(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("float", "decimal"))


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")


_IS_LABEL = {"regression": ("numbers", _is_number), "multi_label": ("lists of classes", _is_list)}


def _targets(
    values: list[Any],
    feature: Any,
    label: str,
    task: str,
    classes: Sequence[str] | None,
    standardise: bool,
) -> Targets:
    """Return numbers, or zeros and ones for lists of classes."""
    if task == "multi_label":
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        own = getattr(inner, "names", None)
        wrong = [place for place, value in enumerate(values) if not isinstance(value, list)]
        problems = [f"row {p}: its {label!r} is {values[p]!r:.60}, no list" for p in wrong]
        refuse(DataError, "hugging_face", problems)
        texts = [SEPARATOR.join(own[v] if own else str(v) for v in row) for row in values]
        classes = classes if classes is not None else own
    else:
        texts = ["" if value is None else str(value) for value in values]
    targets = targets_of(texts, task, classes, SEPARATOR, standardise)
    refuse(DataError, "hugging_face", [f"row {p}: {reason}" for p, reason in targets.problems])
    return targets


def _is_input(feature: Any) -> bool:
    """Whether a column has images or texts."""
    kind = type(feature).__name__
    return kind == "Image" or (kind == "Value" and feature.dtype in ("string", "large_string"))


def _only(
    features: Any, what: str, fits: Any, name: str = "label", but: tuple[Any, ...] = ()
) -> str:
    """Return the only column that fits, else the one of that name."""
    found = [key for key, feature in features.items() if fits(feature) and key not in but]
    if len(found) == 1:
        return found[0]
    if name in features:
        return name
    raise DataError(
        f"which column has the {what}? {name}= says so, one of {found or sorted(features)}"
    )


def _numbered(
    data: Any, label: str, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the classes, and the class number of each row."""
    values = list(data[label])
    own = getattr(data.features[label], "names", None)
    if any(isinstance(value, list | dict | float) for value in values):
        raise DataError(f"column {label!r} has no class for each row, but {values[0]!r:.60}")
    if own is not None:
        texts = [own[v] if v is not None and 0 <= v < len(own) else "" for v in values]
    else:
        texts = ["" if v is None else str(int(v) if isinstance(v, bool) else v) for v in values]
    known = classes_of([text for text in texts if text], classes if classes is not None else own)
    if own is not None and classes is not None and not set(own) & set(known):
        texts = [str(v) for v in values]  # other names for the same classes
    numbers, unknown = numbers_of(texts, known)
    reasons = [
        f"row {place}: {reason if texts[place] else f'no label ({values[place]})'}"
        for place, reason in unknown
    ]
    refuse(DataError, "hugging_face", reasons)
    return known, numbers
