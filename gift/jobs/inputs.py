"""Inputs of predictions: files, folders, patterns, tables; and predictions as JSON or CSV."""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from gift.data.folders import IMAGE_SUFFIXES
from gift.data.tables import read_table
from gift.errors import JobError, refuse
from gift.jobs.guessing import TABLES
from gift.support.csv_text import csv_text

_SOUNDS = (".flac", ".mp3", ".ogg", ".wav")


def inputs_of(run: Any, given: Sequence[str]) -> list[Any]:
    """Return the inputs that are meant: files and texts as they are, and all in folders and tables.

    Args:
        run: `gift.jobs.Run`, whose reader says whether inputs are files or texts.
        given: files, folders, patterns (``*.jpg``), tables, or texts.

    Raises:
        JobError: naming all folders, patterns and tables with no inputs.
    """
    kind = getattr(run.reader, "kind", "")
    found: list[Any] = []
    problems = []
    for one in given:
        items = list(_items(run, one, kind))
        problems += [f"{one}: there are no inputs in it"] if not items else []
        found += items
    refuse(JobError, "there is nothing to predict", problems)
    return found


def _items(run: Any, one: str, kind: str) -> Iterator[Any]:
    path, reads_texts = Path(one).expanduser(), kind == "text"
    if _answers(path.is_file) and path.suffix.lower() in TABLES and kind != "row":
        yield from _of_table(run, path, reads_texts)
    elif _answers(path.is_dir):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        endings = _SOUNDS if kind in ("audio", "extractor") else IMAGE_SUFFIXES
        for file in files:
            if reads_texts and file.suffix.lower() == ".txt":
                yield file.read_text(encoding="utf-8").strip()
            elif not reads_texts and file.suffix.lower() in endings:
                yield str(file)
    elif reads_texts or not glob.has_magic(one) or _answers(path.exists):
        yield one
    else:
        yield from sorted(glob.glob(str(path), recursive=True))


def _answers(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except (OSError, ValueError):  # a text that cannot be the name of a file
        return False


def _of_table(run: Any, path: Path, reads_texts: bool) -> Iterator[Any]:
    """Yield the inputs in a table whose columns are called as those of the job's data."""
    options = run.job.data.options
    if not reads_texts:
        rows = read_table(path, (options.get("path", "path"),))
        yield from (str(path.parent / cell.strip()) for (cell,) in rows.values)
        return
    text, pair = options.get("text", "text"), options.get("pair")
    rows = read_table(path, (text,) if pair is None else (text, pair))
    yield from (values[0] if pair is None else values for values in rows.values)


def as_json(found: Sequence[Any]) -> str:
    """Return predictions as JSON, a list of objects."""
    return json.dumps([plain(one) for one in found], ensure_ascii=False, indent=1)


def as_csv(found: Sequence[Any]) -> str:
    """Return predictions as CSV: a row for each, or for each object that was detected."""
    rows = [row for one in found for row in _rows(plain(one))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(columns, rows)


def _rows(one: Any) -> Iterator[dict[str, Any]]:
    """Yield flat rows of a prediction."""
    if not isinstance(one, dict):
        yield {"prediction": one}
        return
    flat: dict[str, Any] = {}
    for key, value in one.items():
        if key == "input" and isinstance(value, list):
            flat |= {"input": value[0], "pair": value[1]} if len(value) == 2 else {key: str(value)}
        elif isinstance(value, dict):
            flat |= {str(name): part for name, part in value.items()}
        elif key not in ("top", "boxes", "scores"):
            flat[key] = " | ".join(map(str, value)) if isinstance(value, list) else value
    if "boxes" not in one:
        yield flat
        return
    flat.pop("labels", None)
    for box, label, score in zip(one["boxes"], one["labels"], one["scores"], strict=True):
        corners = dict(zip(("left", "top", "right", "bottom"), box, strict=True))
        yield flat | {"label": label, "score": score} | corners


def plain(value: Any) -> Any:
    """Convert to plain data: predictions become dictionaries, tensors become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


FORMATS: dict[str, Callable[[Sequence[Any]], str]] = {".csv": as_csv, ".json": as_json}
