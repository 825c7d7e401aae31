"""A job for a folder or a table, when there is no job file."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gift.data.folders import IMAGE_SUFFIXES
from gift.errors import JobError, some
from gift.jobs.kinds import KINDS
from gift.jobs.models import Job
from gift.jobs.reading import changed, checked

TABLES = (".csv", ".tsv")
_TRAIN = ("train", "training")
_VALID = ("val", "valid", "validation", "dev", "eval", "test", "testing")
_TEXT = ("text", "sentence", "review", "content", "comment", "body", "message", "question", "title")
_PATH = ("path", "file", "filename", "file_name", "image")
_LABEL = ("label", "labels", "class", "category", "target", "sentiment", "y")
_ROWS = 2000
"""Number of rows of a table that are looked at."""


def guess_job(place: str | Path, network: str | None = None, changes: Iterable[str] = ()) -> Job:
    """Return a job for a folder of class folders, or for a table of texts or images.

    Folders or tables that are called train and val (or valid, dev, test) are used as such; else a
    fifth of the examples is held out.

    Args:
        place: path of a folder, or of a CSV or TSV table.
        network: name of the network; None is a network that fits the kind of examples.
        changes: settings that override the guessed ones, ``training.epochs=3``.

    Raises:
        JobError: if it is neither, or its columns do not say what they are.
        FileNotFoundError: if there is nothing at that path.
    """
    path = Path(place).expanduser().resolve()
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {place}")
    data = _of_folder(path) if path.is_dir() else _of_table(path)
    chosen = network or KINDS[data["kind"]].network
    job: dict[str, Any] = {
        "network": None if str(chosen).startswith("import:") else {"name": chosen},
        "data": data,
        "folder": f"{path.stem}-run",
    }
    changed(job, changes)
    return checked(Job, job, f"what was guessed for {place}").anchored(Path.cwd())


def _of_folder(path: Path) -> dict[str, Any]:
    """Return the data section for a folder."""
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = {"kind": "class_folders", "options": {"augment": True}}
    train, valid = (_named(inside, names, _has_classes) for names in (_TRAIN, _VALID))
    if train is not None:
        return folders | {"train": str(train)} | _held_out(valid)
    if _has_classes(path):
        return folders | {"train": str(path)} | _held_out(None)
    tables = [entry for entry in inside if _is_table(entry)]
    train = _named(tables, _TRAIN, _is_table) or (tables[0] if len(tables) == 1 else None)
    if train is not None:
        return _of_table(train)
    raise JobError(
        f"{path} does not say what it has",
        [
            "expected a folder of images for each class, or folders train and val with these, or "
            "tables train.csv and val.csv; for everything else write a job: gift init job.yaml"
        ],
    )


def _held_out(valid: Path | None) -> dict[str, Any]:
    return {"valid_share": 0.2} if valid is None else {"valid": str(valid)}


def _named(
    entries: Iterable[Path], names: Sequence[str], fits: Callable[[Path], bool]
) -> Path | None:
    found = {entry.stem.lower(): entry for entry in entries if fits(entry)}
    return next((found[name] for name in names if name in found), None)


def _is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in TABLES


def _has_classes(path: Path) -> bool:
    """Whether a folder has at least two folders, all with images."""
    if not path.is_dir():
        return False
    folders = [f for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")]
    with_images = (
        any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))
        for folder in folders
    )
    return len(folders) >= 2 and all(with_images)


def _of_table(path: Path) -> dict[str, Any]:
    """Return the data section for a table: texts, or paths of images, and labels."""
    if path.suffix.lower() not in TABLES:
        problem = "expected a job file (.yaml), a folder, or a table (.csv, .tsv)"
        raise JobError(f"{path} does not say what it has", [problem])
    rows = _rows(path)
    has_header = _has_header(rows)
    names: list[Any] = rows[0] if has_header else [*range(len(rows[0]))]
    columns = dict(zip(names, zip(*rows[has_header:], strict=True), strict=True))
    images = [name for name, cells in columns.items() if all(map(_is_image, cells))]
    # The longest cells are the texts, the fewest different ones the labels.
    entry = images[0] if images else _column(columns, _TEXT, lambda cells: -len("".join(cells)))
    rest = {name: cells for name, cells in columns.items() if name != entry}
    label = _column(rest, _LABEL, lambda cells: len({*cells}))
    kinds = len({*columns[label]})
    if not images and all(map(_is_number, columns[entry])):
        _refuse(path, names, "it has numbers only: data of kind tabular need a network of your own")
    if kinds < 2 or kinds > max(2, len(rows) // 2):
        _refuse(
            path, names, f"column {label!r} has {kinds} different values: these are not classes"
        )
    kind, named = ("picture_table", "path") if images else ("text_table", "text")
    sibling = None
    if path.stem.lower() in _TRAIN:
        sibling = _named(sorted(path.parent.iterdir()), _VALID, _is_table)
    options = {named: entry, "label": label}
    return {"kind": kind, "options": options, "train": str(path)} | _held_out(sibling)


def _refuse(path: Path, names: Sequence[Any], reason: str) -> None:
    columns = some([str(name) for name in names], 10)
    raise JobError(
        f"{path} does not say which examples it has",
        [f"{reason}; its columns are {columns}. Write a job: gift init job.yaml"],
    )


def _rows(path: Path) -> list[list[str]]:
    """Return the first rows that are as long as the first; reading all of them names the others."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        found = csv.reader(file, delimiter=delimiter, quoting=quoting)
        try:
            rows = [row for row, _ in zip(found, range(_ROWS), strict=False) if any(row)]
        except csv.Error as error:
            raise JobError(f"{path} cannot be read as a table", [str(error)]) from error
    width = len(rows[0]) if rows else 0
    rows = [row for row in rows if len(row) == width]
    if len(rows) < 2 or width < 2:
        problem = "expected rows with an input and a label"
        raise JobError(f"{path} is not a table of examples", [problem])
    return rows


def _has_header(rows: list[list[str]]) -> bool:
    """Whether the first row has names: known ones, or none that stand in their column again."""
    first = [cell.strip().lower() for cell in rows[0]]
    if {*first} & {*_TEXT, *_LABEL, *_PATH}:
        return True
    columns = zip(*rows[1:], strict=True)
    again = any(name in cells for name, cells in zip(rows[0], columns, strict=True))
    return not again and not any(_is_image(cell) or _is_number(cell) for cell in rows[0])


def _is_image(cell: str) -> bool:
    return cell.strip().lower().endswith(IMAGE_SUFFIXES)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _column(columns: dict[Any, Any], known: Sequence[str], rank: Callable[[Any], int]) -> Any:
    """Return the column with a known name, else that of the lowest rank."""
    named = {str(name).strip().lower(): name for name in columns}
    found = next((named[name] for name in known if name in named), None)
    # Of columns that are alike, the last one is it: labels stand behind what they are of.
    others = [*columns][::-1]
    return min(others, key=lambda name: rank(columns[name])) if found is None else found
