"""Images and sounds in folders, one folder for each class."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gift.data.classes import classes_of, numbers_of
from gift.data.examples import Examples, Reader
from gift.data.reading import read_examples
from gift.errors import DataError, refuse, some

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name extensions of images."""
AUDIO_SUFFIXES = (".aif", ".aiff", ".au", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
"""File name extensions of sounds."""


def class_folders(
    path: str | Path,
    reader: Reader,
    classes: Sequence[str] | None = None,
    augment: bool = False,
    task: str = "classification",
) -> Examples:
    """Load images from a folder that has a subfolder for each class.

    All images anywhere below the folder of a class belong to it. Hidden files, and files without
    the extension of an image, are skipped.

    Args:
        path: path of the folder.
        reader: converts images to tensors: `PictureReader`, or the reader of a network's weights.
        classes: names of the classes in the order of their numbers, `train.classes` for
            validation; None uses the folders in alphabetical order.
        augment: crop and flip images at random, for training.
        task: "classification", or "contrastive" for vectors in which those of a class are close.

    Raises:
        DataError: naming all folders that are empty or not a class, and all files that are empty.

    Example:
        >>> from gift.data import PictureReader, class_folders
        >>> class_folders("nowhere", PictureReader(size=224))
        Traceback (most recent call last):
        gift.errors.DataError: nowhere:
          there is no such folder
    """
    return classes_in(path, reader, classes, augment, IMAGE_SUFFIXES, "images", task)


def audio_folders(
    path: str | Path,
    reader: Reader,
    classes: Sequence[str] | None = None,
    augment: bool = False,
) -> Examples:
    """Load sounds from a folder that has a subfolder for each class.

    All sounds anywhere below the folder of a class belong to it. Hidden files, and files without
    the extension of a sound, are skipped.

    Args:
        path: path of the folder.
        reader: converts sounds: `AudioReader`, `ExtractorReader`, or the reader of a network.
        classes: names of the classes in the order of their numbers, `train.classes` for
            validation; None uses the folders in alphabetical order.
        augment: take a random part of long sounds, for training.

    Raises:
        DataError: naming all folders that are empty or not a class, and all files that are empty.
    """
    return classes_in(path, reader, classes, augment, AUDIO_SUFFIXES, "sounds")


def classes_in(
    path: str | Path,
    reader: Reader,
    classes: Sequence[str] | None,
    augment: bool,
    suffixes: Sequence[str],
    what: str,
    task: str = "classification",
) -> Examples:
    """Load files with one of some extensions from a folder that has a subfolder for each class."""
    path = Path(path)
    if not path.is_dir():
        refuse(
            DataError,
            str(path),
            ["there is no such folder" if not path.exists() else "this is not a folder"],
        )
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not _is_hidden(f.name))
    if not folders:
        refuse(DataError, str(path), ["there are no folders in it, expected one for each class"])
    known = classes_of([folder.name for folder in folders], classes)
    numbers, unknown = numbers_of([folder.name for folder in folders], known)
    problems = [f"folder {folders[place].name}: {reason}" for place, reason in unknown]
    found: list[tuple[str, int]] = []
    for folder, number in zip(folders, numbers, strict=True):
        images = list(files_in(folder, suffixes))
        if not images:
            problems.append(f"folder {folder.name}: no {what} in it ({some(suffixes, 20)})")
        problems += [f"{p.relative_to(path)}: empty file" for p in images if not p.stat().st_size]
        found += [(str(image), number) for image in images]
    refuse(DataError, str(path), problems)
    if task not in ("classification", "contrastive"):
        raise DataError(f"the task is {task!r}, expected 'classification' or 'contrastive'")
    return replace(read_examples(found, reader, augment, known), task=task)


def files_in(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Iterator[Path]:
    """Yield all files with these extensions below a folder, always in the same order."""
    for entry in sorted(folder.iterdir()):
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from files_in(entry, suffixes)
        elif entry.suffix.lower() in suffixes and entry.is_file():
            yield entry


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
