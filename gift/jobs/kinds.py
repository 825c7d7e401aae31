"""The kinds of examples that a job can name, and the arguments of each."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gift.jobs.documented import described_arguments, parameters_of
from gift.jobs.errors import hint, in_words


@dataclass(frozen=True)
class DataKind:
    """A function of `gift.data` that reads examples, and values that `init_text` proposes.

    Args:
        name: name in a job.
        place: argument that differs between training and validation examples; None if there are
            several.
        train, valid: proposed values for it.
        network: proposed network; None if there can only be one of your own.
        options: proposed values for arguments without defaults.
        files: arguments that are files or folders.
        names: arguments that are files or folders if these exist, else names.
        task: task of the examples.
        readers: possible readers of inputs, in `gift.data`; none if the training examples make it.
    """

    name: str
    place: str | None
    train: Any
    valid: Any
    network: str | None
    options: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ("path",)
    names: tuple[str, ...] = ()
    task: str = "classification"
    readers: tuple[str, ...] = ("PictureReader",)

    @property
    def function(self) -> Callable[..., Any]:
        """The function."""
        import gift.data

        made = getattr(gift.data, self.name, None)
        return made or getattr(gift.data, f"{self.name}_dataset")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments and their defaults; `inspect.Parameter.empty` if there is none."""
        return {k: v for k, v in parameters_of(self.function).items() if k != "reader"}

    def described(self) -> dict[str, str]:
        """Return the descriptions of the arguments."""
        return described_arguments(self.function)

    def keywords(self, place: Any) -> dict[str, Any]:
        """Return the keywords for the examples in a place: one value, or several by name."""
        if isinstance(place, dict):
            return place
        if self.place is None:
            raise ValueError(f"expected {' and '.join(self.train)}, each on a line of its own")
        return {self.place: place}

    def checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments, converted to the types of the function.

        Raises:
            ValueError: naming all arguments that do not exist or have a wrong type.
        """
        parameters = signature(self.function).parameters
        return _fitting(given, {name: parameters[name].annotation for name in self.arguments()})

    def reader_settings(self) -> dict[str, Any]:
        """Return the settings of the readers, and their types."""
        import gift.data

        classes = [getattr(gift.data, name) for name in self.readers]
        return {field.name: field.type for made in classes for field in fields(made) if field.init}

    def checked_reader(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a reader, converted to its types; raises like `checked`."""
        return _fitting(given, self.reader_settings())

    def refuse_missing(self, given: dict[str, Any]) -> None:
        """Raise a ValueError that names the missing required arguments."""
        needed = [name for name, value in self.arguments().items() if value is Parameter.empty]
        missing = [name for name in needed if name not in given]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given, here or in options")

    def anchored(self, given: dict[str, Any], base: Path) -> dict[str, Any]:
        """Return the arguments with paths made relative to a folder."""
        found = dict(given)
        for name in given.keys() & {*self.files, *self.names}:
            value, always = given[name], name in self.files
            several = isinstance(value, list | tuple)
            paths = [anchored(str(one), base, always) for one in (value if several else [value])]
            found[name] = paths if several else paths[0]
        return found


def _fitting(given: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Convert values to these types; raises a ValueError that names all that do not fit."""
    problems, good = [], {}
    for name, value in given.items():
        if name not in types:
            problems.append(f"there is no {name!r}, {hint(name, types)}")
            continue
        try:
            good[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            problems.append(f"{name}: {in_words(error.errors()[0], lambda path: ())}")
    if problems:
        raise ValueError("; ".join(problems))
    return good


def anchored(path: str, base: Path, always: bool = True) -> str:
    """Resolve a path from a folder; unless `always`, keep it if it does not exist there."""
    seen = base / Path(path).expanduser()
    return str(seen) if always or (path and seen.exists()) else path


_IMAGES, _TEXTS = "torchvision:resnet18", "transformers:bert-base-uncased"
_SOUNDS, _SOUND_READERS = "transformers:facebook/wav2vec2-base", ("AudioReader", "ExtractorReader")
_SEGMENTATION = "torchvision:lraspp_mobilenet_v3_large"

KINDS = {
    kind.name: kind
    for kind in (
        DataKind("class_folders", "path", "data/train", "data/val", _IMAGES),
        DataKind(
            "picture_table", "csv", "data/train.csv", "data/val.csv", _IMAGES, files=("csv",)
        ),
        DataKind(
            "torchvision", "split", "train", "test", _IMAGES,
            {"name": "CIFAR10", "root": "data"}, files=("root",),
        ),
        DataKind(
            "mask_folders", None,
            {"images": "data/train/images", "masks": "data/train/masks"},
            {"images": "data/val/images", "masks": "data/val/masks"},
            _SEGMENTATION, files=("images", "masks"), task="segmentation",
            readers=("SegmentationReader",),
        ),
        DataKind(
            "mask_table", "csv", "data/train.csv", "data/val.csv", _SEGMENTATION, files=("csv",),
            task="segmentation", readers=("SegmentationReader",),
        ),
        DataKind(
            "coco", None,
            {"images": "data/train", "annotations": "data/train.json"},
            {"images": "data/val", "annotations": "data/val.json"},
            "torchvision:fasterrcnn_resnet50_fpn",
            files=("images", "annotations"), task="detection", readers=("DetectorReader",),
        ),
        DataKind(
            "text_table", "path", "data/train.tsv", "data/val.tsv", _TEXTS, readers=("TextReader",)
        ),
        DataKind(
            "audio_folders", "path", "data/train", "data/val", _SOUNDS, readers=_SOUND_READERS
        ),
        DataKind(
            "audio_table", "csv", "data/train.csv", "data/val.csv", _SOUNDS, files=("csv",),
            readers=_SOUND_READERS,
        ),
        DataKind(
            "tabular", "csv", "data/train.csv", "data/val.csv", None, files=("csv",), readers=()
        ),
        DataKind(
            "text_pairs", "path", "data/train.csv", "data/val.csv",
            "transformers:sentence-transformers/all-MiniLM-L6-v2", task="contrastive",
            readers=("TextReader",),
        ),
        DataKind(
            "language_text", "path", "data/train.txt", "data/val.txt", "transformers:gpt2",
            task="language", readers=("TextReader",),
        ),
        DataKind(
            "chats", "path", "data/train.jsonl", "data/val.jsonl",
            "transformers:HuggingFaceTB/SmolLM2-135M-Instruct", task="language",
            readers=("TextReader",),
        ),
        DataKind(
            "hugging_face", "split", "train", "validation", _TEXTS,
            {"dataset": "stanfordnlp/sst2"}, files=(), names=("dataset",),
            readers=("TextReader", "PictureReader"),
        ),
    )
}  # fmt: skip
"""Kinds of examples by name."""
