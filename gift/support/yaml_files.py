"""YAML as plain data: scalars mean what YAML 1.2 says, and a file costs no more than its size.

PyYAML reads YAML 1.1, where ``yes`` is true, ``1:30`` is 90 and ``010`` is 8. Here the first two
are texts, as in YAML 1.2, and the third is refused, since people mean different things by it.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gift.errors import YamlError
from gift.support.optional import require

LARGEST_FILE = 2**20
"""Bytes of a file."""
LARGEST = 100_000
"""Values in a file, where each alias counts as all that it stands for."""
DEEPEST = 150
"""Levels of lists and mappings in each other."""

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2 (section 10.3.2), and "<<", which many files use.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+")


@cache
def _classes() -> tuple[Any, Any]:
    """What reads, and what writes so that this and readers of YAML 1.1 read the same."""
    yaml = require("yaml", "yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]  # a module of any type
        yaml_implicit_resolvers: dict[str, Any] = {}  # PyYAML's own way

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined]
        yaml_implicit_resolvers = {k: list(v) for k, v in
                                   yaml.SafeDumper.yaml_implicit_resolvers.items()}  # fmt: skip

        def ignore_aliases(self, data: Any) -> bool:
            return True

    for name, (pattern, first) in _SCALARS.items():
        found = re.compile(rf"(?:{pattern})\Z")
        for made in (Loader, Dumper):
            made.add_implicit_resolver(_TAG + name, found, first)
    return Loader, Dumper


def read_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        YamlError: if it is too large, or no text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise YamlError([f"it has {size:,} bytes, expected at most {LARGEST_FILE:,}"])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise YamlError([f"it is no text in UTF-8: {error}"]) from error


def load(text: str) -> tuple[Any, Any]:
    """The plain data of a text, and the node of PyYAML, which has lines.

    Raises:
        YamlError: if it is no YAML, says something twice, or stands for more than its size.
    """
    yaml = require("yaml", "yaml")
    loader = _classes()[0](text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_size(node)
        if problems := list(_problems(node, "", set())):
            raise YamlError(problems)
        return loader.construct_document(node), node
    except yaml.YAMLError as error:
        raise YamlError([_in_a_line(error)]) from error
    except RecursionError:
        raise YamlError([f"it is nested deeper than {DEEPEST} levels"]) from None
    except ValueError as error:
        raise error if isinstance(error, YamlError) else YamlError([str(error)]) from error
    finally:
        loader.dispose()


def dump(data: Any, width: int | None = None) -> str:
    """Plain data as a text that `load` reads again."""
    yaml = require("yaml", "yaml")
    return yaml.dump(data, Dumper=_classes()[1], sort_keys=False, allow_unicode=True, width=width)


def children(node: Any) -> list[tuple[Any, Any]]:
    """Pairs of key and value in a mapping, of place and value in a list; none for others."""
    if node.id == "mapping":
        return list(node.value)
    return list(enumerate(node.value)) if node.id == "sequence" else []


def _refuse_size(node: Any) -> None:
    """Refuse what is too deep, within itself, or too much where aliases are written out."""
    sizes: dict[int, int] = {}  # of nodes, written out
    above: set[int] = set()

    def size(node: Any, depth: int) -> int:
        line = node.start_mark.line + 1
        if id(node) in above:
            raise YamlError([f"line {line}: this contains itself"])
        if depth > DEEPEST:
            raise YamlError([f"line {line}: this is nested deeper than {DEEPEST} levels"])
        if id(node) not in sizes:
            above.add(id(node))
            total = 1 + sum(size(value, depth + 1) for _, value in children(node))
            if node.id == "mapping":
                total += sum(size(key, depth + 1) for key, _ in children(node))
            above.discard(id(node))
            sizes[id(node)] = total
        if sizes[id(node)] > LARGEST:
            raise YamlError(
                [f"line {line}: this stands for more than {LARGEST:,} values, aliases written out"]
            )
        return sizes[id(node)]

    size(node, 0)


def _problems(node: Any, place: str, seen: set[int]) -> Iterator[str]:
    """Keys that are given twice, and numbers of which it is not clear which they are."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if node.id == "scalar":
        if node.style is None and node.tag == f"{_TAG}int" and _AMBIGUOUS.fullmatch(node.value):
            yield (
                f"line {node.start_mark.line + 1}: {node.value} is an octal number for some "
                f"readers of YAML and a decimal one for others: write {int(node.value)}, or "
                f"'{node.value}' for a text"
            )
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in children(node):
        inner = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key.value}"
        inner = inner.lstrip(".")
        if not isinstance(key, int):
            line = key.start_mark.line + 1
            known = (key.tag, str(key.value))
            if known in lines and key.id == "scalar":
                yield f"lines {lines[known]} and {line}: {inner} is given twice"
            lines[known] = line
            yield from _problems(key, inner, seen)
        yield from _problems(value, inner, seen)


def _in_a_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    text = getattr(error, "problem", None) or f"{error}"
    return where + " ".join(f"{text}".split())
