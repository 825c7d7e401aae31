"""Reading job files: YAML becomes a job, or one error that names every problem."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from gift.errors import JobError, YamlError
from gift.jobs.errors import dotted, in_words
from gift.jobs.models import Job
from gift.support import yaml_files
from gift.support.atomic_files import write_text

KeyPath = tuple[Any, ...]
M = TypeVar("M", bound=BaseModel)


def read_job(path: str | Path, changes: Iterable[str] = ()) -> Job:
    """Read a job from a YAML file; paths in it are relative to its folder.

    Args:
        path: path of the file.
        changes: settings that override those of the file, ``training.epochs=3``.

    Raises:
        FileNotFoundError: if there is no such file.
        JobError: naming everything that is wrong.
    """
    path = Path(path).expanduser()
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise JobError(f"{path} is not a job", ["expected lines 'name: value'; see gift init"])
    others = changed(data, changes)
    kept = {at: n for at, n in lines.items() if not any(at[: len(o)] == o for o in others)}
    return checked(Job, data, str(path), kept).anchored(path.resolve().parent)


def checked(model: type[M], data: Any, what: str, lines: Mapping[KeyPath, int] | None = None) -> M:
    """Create a job, or a section of one, from plain data.

    Args:
        model: class of the result.
        data: a mapping.
        what: name of the data in errors.
        lines: line numbers of the settings in the file.

    Raises:
        JobError: naming everything that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
    first = {_path(one): one for one in reversed(found)}  # each alternative fails separately
    problems = sorted(_problem(path, one, lines or {}, model) for path, one in first.items())
    raise JobError(f"{what} cannot be used as it is", [text for _, text in problems])


def _path(error: Any) -> KeyPath:
    """Return the place of an error, without the alternatives that pydantic adds."""
    path = tuple(part for part in error["loc"] if part != "[key]")
    return path[:2] if path[:1] == ("training",) else path


def _problem(
    path: KeyPath, error: Any, lines: Mapping[KeyPath, int], model: type[BaseModel]
) -> tuple[int, str]:
    """Return the line of a problem, 0 if it has none in the file, and its description."""
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)
    where = f"line {line}, " if line else ""
    return line, f"{where}{dotted(path)}: {in_words(error, lambda at: _names_at(model, at))}"


def _names_at(model: Any, path: KeyPath) -> Sequence[str]:
    """Return the names of the settings at a place of a model, as far as its classes have them."""
    for part in path:
        known = getattr(model, "model_fields", {})
        model = _with_settings(known[part].annotation) if part in known else None
    if is_dataclass(model):
        return [field.name for field in fields(model)]
    return list(getattr(model, "model_fields", ()))


def _with_settings(annotation: Any) -> Any:
    """Return the class with settings in an annotation such as ``Section | None``."""
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or is_dataclass(annotation)
    ):
        return annotation
    found = (_with_settings(part) for part in get_args(annotation))
    return next((one for one in found if one is not None), None)


def changed(data: dict[str, Any], changes: Iterable[str]) -> list[KeyPath]:
    """Change plain data, for example by ``training.epochs=3``, and return the changed places.

    Raises:
        JobError: if a change is not valid.
    """
    return [_change(data, change) for change in changes]


def _change(data: dict[str, Any], change: str) -> tuple[str, ...]:
    """Make one change in plain data, and return its place."""
    name, equals, text = change.partition("=")
    if not equals or not all(name.split(".")):
        what = f"{change!r} changes nothing"
        raise JobError(what, ["expected the name of a setting and a value: training.epochs=3"])
    try:
        value, _ = yaml_files.load(text)
    except YamlError as error:
        raise JobError(f"{change!r} is not a value in YAML", error.problems) from error
    place = tuple(name.split("."))
    put(data, place, value)
    return place


def put(data: dict[str, Any], place: Sequence[str], value: Any) -> None:
    """Put a value at a place of plain data; sections that are not there are made.

    A strategy or schedule that is a bare name gets arguments.
    """
    *sections, last = place
    for section in sections:
        inner = data.get(section)
        if not isinstance(inner, dict):
            inner = {"name": inner} if isinstance(inner, str) else {}
            data[section] = inner
        data = inner
    data[last] = value


def read_yaml(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Read the plain data in a YAML file, and the line of each setting.

    Raises:
        FileNotFoundError: if there is no such file.
        JobError: if it is not YAML, has duplicate keys, or expands to more than its size.
    """
    try:
        data, node = yaml_files.load(yaml_files.read_text(path))
    except YamlError as error:
        raise JobError(f"{path} cannot be read as YAML", error.problems) from error
    return data, {} if node is None else dict(_entries(node, (), set()))


def _entries(node: Any, place: KeyPath, seen: set[int]) -> Iterator[tuple[KeyPath, int]]:
    """Yield the place and line of each setting; repeated aliases are visited once."""
    if node.id != "mapping" or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in yaml_files.children(node):
        inner = (*place, key.value if isinstance(key.value, str) else "?")
        yield inner, key.start_mark.line + 1
        yield from _entries(value, inner, seen)


def write_job(job: Job, path: str | Path) -> None:
    """Write a job as YAML, atomically."""
    write_text(path, yaml_files.dump(job.to_config()))
