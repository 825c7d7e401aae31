"""Safe YAML as plain data: scalars as in YAML 1.2, and limits on size and nesting.

PyYAML reads YAML 1.1, where ``yes`` is true, ``1:30`` is 90 and ``010`` is 8. Here the first two
are strings, as in YAML 1.2. The third is refused, because readers disagree about it.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gift.errors import YamlError
from gift.support.optional import require

LARGEST_FILE = 2**20
"""Maximum size of a file in bytes."""
LARGEST = 100_000
"""Maximum number of values in a file; each alias counts as everything that it stands for."""
DEEPEST = 150
"""Maximum nesting of lists and mappings."""

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2 (section 10.3.2), plus "<<" (merge), which many files use.
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
    """Loader and dumper; what the dumper writes means the same to readers of YAML 1.1 and 1.2."""
    yaml = require("yaml", "yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]  # a module of any type
        yaml_implicit_resolvers: dict[str, Any] = {}  # replaces the resolvers of YAML 1.1

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
    """Read the text of a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        YamlError: if it is too large, or is not text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise YamlError([f"it has {size:,} bytes, expected at most {LARGEST_FILE:,}"])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise YamlError([f"it is not text in UTF-8: {error}"]) from error


def load(text: str) -> tuple[Any, Any]:
    """Parse a text; returns the plain data and PyYAML's node, which has line numbers.

    Raises:
        YamlError: if it is not YAML, gives a key twice, or is too large or too deep with aliases
            written out.
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
    """Convert plain data to a text that `load` can read."""
    yaml = require("yaml", "yaml")
    return yaml.dump(data, Dumper=_classes()[1], sort_keys=False, allow_unicode=True, width=width)


def children(node: Any) -> list[tuple[Any, Any]]:
    """Pairs of key and value of a mapping, or of index and value of a list; empty for others."""
    if node.id == "mapping":
        return list(node.value)
    return list(enumerate(node.value)) if node.id == "sequence" else []


def _refuse_size(node: Any) -> None:
    """Refuse nodes that are too deep, contain themselves, or are too large once aliases expand."""
    sizes: dict[int, int] = {}  # by id of the node, with aliases expanded
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
    """Duplicate keys, and numbers that readers of YAML interpret differently."""
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
