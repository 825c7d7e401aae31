"""Job files: YAML in, a job or one error that names everything out."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gift.extras import needed
from gift.files.container import write_text
from gift.jobs import models
from gift.jobs.errors import JobError, dotted, in_words
from gift.jobs.models import Job
from gift.training.settings import Settings

Place = tuple[Any, ...]
M = TypeVar("M", bound=BaseModel)

_SECTIONS: dict[Place, type[BaseModel]] = {
    (): Job,
    ("network",): models.Network,
    ("data",): models.Data,
    ("strategy",): models.Strategy,
    ("schedule",): models.Schedule,
}


def read_job(path: str | Path, changes: Iterable[str] = ()) -> Job:
    """The job in a YAML file; the files that it names are as seen from its folder.

    Args:
        path: of the file.
        changes: settings that are other than in the file, ``training.epochs=3``.

    Raises:
        FileNotFoundError: if there is no such file.
        JobError: naming all that is wrong.
    """
    path = Path(path).expanduser()
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise JobError(f"{path} is no job", ["expected lines 'name: value'; see gift init"])
    others = changed(data, changes)
    kept = {at: n for at, n in lines.items() if not any(at[: len(o)] == o for o in others)}
    return checked(Job, data, str(path), kept).anchored(path.resolve().parent)


def checked(model: type[M], data: Any, what: str, lines: Mapping[Place, int] | None = None) -> M:
    """The job, or the part of one, that plain data describes.

    Args:
        model: what it shall be.
        data: a mapping.
        what: its name in errors.
        lines: the lines of the file in which the settings are.

    Raises:
        JobError: naming all that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
    first = {_path(one): one for one in reversed(found)}  # alternatives fail one by one
    problems = sorted(_problem(path, one, lines or {}) for path, one in first.items())
    raise JobError(f"{what} cannot be used as it is", [text for _, text in problems])


def _path(error: Any) -> Place:
    """The place of an error, without what pydantic calls the alternatives that it tried."""
    path = tuple(part for part in error["loc"] if part != "[key]")
    return path[:2] if path[:1] == ("training",) else path


def _problem(path: Place, error: Any, lines: Mapping[Place, int]) -> tuple[int, str]:
    """The line of a problem, 0 where it is none of the file, and the problem in words."""
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)
    where = f"line {line}, " if line else ""
    return line, f"{where}{dotted(path)}: {in_words(error, _names_at)}"


def _names_at(path: Place) -> Sequence[str]:
    if path == ("training",):
        return [field.name for field in fields(Settings)]
    return list(_SECTIONS[path].model_fields) if path in _SECTIONS else ()


def changed(data: dict[str, Any], changes: Iterable[str]) -> list[Place]:
    """Make changes in plain data, such as ``training.epochs=3``; gives their places.

    Raises:
        JobError: if one makes no sense.
    """
    return [_change(data, change) for change in changes]


def _change(data: dict[str, Any], change: str) -> tuple[str, ...]:
    """Make one change in plain data; gives its place."""
    yaml = needed("yaml", "yaml")
    name, equals, text = change.partition("=")
    if not equals or not all(name.split(".")):
        what = f"{change!r} changes nothing"
        raise JobError(what, ["expected the name of a setting and a value: training.epochs=3"])
    try:
        value = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise JobError(f"{change!r} is no value in YAML", [_in_a_line(error)]) from error
    *sections, last = place = tuple(name.split("."))
    for section in sections:
        inner = data.get(section)
        if not isinstance(inner, dict):
            # a bare name of a strategy or schedule gets arguments
            inner = {"name": inner} if isinstance(inner, str) else {}
            data[section] = inner
        data = inner
    data[last] = value
    return place


@cache
def _loader() -> Any:
    """Reads plain data, and 1e-3 as the number that it is in YAML 1.2."""
    yaml = needed("yaml", "yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]  # a module of any type
        pass

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def read_yaml(path: Path) -> tuple[Any, dict[Place, int]]:
    """The plain data in a YAML file, and in which line each setting is.

    Raises:
        FileNotFoundError: if there is no such file.
        JobError: if it is no YAML, or says something twice.
    """
    yaml = needed("yaml", "yaml")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_loader())
        data = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise JobError(f"{path} cannot be read as YAML", [_in_a_line(error)]) from error
    lines: dict[Place, int] = {}
    twice = []
    for place, line in _entries(node, (), set()):
        if place in lines:
            twice.append(f"lines {lines[place]} and {line}: {dotted(place)} is given twice")
        lines[place] = line
    if twice:
        raise JobError(f"{path} contradicts itself", twice)
    return data, lines


def _entries(node: Any, place: Place, seen: set[int]) -> Iterator[tuple[Place, int]]:
    """The place and line of each setting; what aliases repeat is looked at once."""
    if getattr(node, "id", None) != "mapping" or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in node.value:
        inner = (*place, key.value if isinstance(key.value, str) else "?")
        yield inner, key.start_mark.line + 1
        yield from _entries(value, inner, seen)


def _in_a_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    text = getattr(error, "problem", None) or f"{error}"
    return where + " ".join(f"{text}".split())


def write_job(job: Job, path: str | Path) -> None:
    """Write a job as YAML, whole or not at all."""
    text = needed("yaml", "yaml").safe_dump(job.to_config(), sort_keys=False, allow_unicode=True)
    write_text(path, text)
