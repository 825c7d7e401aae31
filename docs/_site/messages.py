"""The messages of gift's errors and warnings, read from its source."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from docs._site.public import ROOT

HOLE = "…"
"""What stands for a part of a message that differs from case to case."""

KINDS = {
    "Incompatible": "listed in a DeltaFileError",
    "Mixed": "in an error of `DeltaBank.rows`",
    "Yield": "listed in an error",
}
"""What stands in the place of kinds that no user meets by that name."""

_CALLS = {"warn"}
_NO_ERRORS = {
    "StopIteration",
    "Exit",
    "KeyError",
    "LookupError",
    "AttributeError",
    "AssertionError",
}


class Message(NamedTuple):
    """One message.

    Args:
        kind: name of the error's class, or "GiftWarning".
        text: what it says, with `HOLE` for what differs.
        module: the module that raises it.
    """

    kind: str
    text: str
    module: str


def messages() -> list[Message]:
    """All messages, in the order of the modules."""
    found: dict[tuple[str, str], Message] = {}
    for file in _trees():
        for message in _of_file(file):
            found.setdefault((message.kind, message.text), message)
    return list(found.values())


@cache
def fragments() -> str:
    """All texts in the source of gift, one a line, to look a quoted message up in."""
    lines = []
    for tree in _trees().values():
        for node in ast.walk(tree):
            said = isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)
            if said and (text := text_of(node)):
                lines.append(" ".join(text.split()))
    return "\n".join(lines)


@cache
def _trees() -> dict[Path, ast.Module]:
    files = sorted((ROOT / "gift").rglob("*.py"))
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def text_of(node: ast.AST | None) -> str:
    """What an expression says, with `HOLE` for what is not written in it; "" if that is all."""
    text = _text(node)
    return "" if not text.strip(f"{HOLE} :.,\n()") else text


def _text(node: ast.AST | None) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return HOLE


def _of_file(file: Path) -> Iterator[Message]:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.walk(_trees()[file]):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(node, ast.Yield) and " " in (text := text_of(node.value)):
            yield Message(KINDS["Yield"], " ".join(text.split()), module)
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        if isinstance(node, ast.Raise):
            kind, texts = name, call.args[:1]
        elif name in _CALLS:
            kind, texts = "GiftWarning", call.args[:1]
        elif name == "refuse" and call.args:
            kind, texts = ast.unparse(call.args[0]), call.args[1:2]
        else:
            continue
        for text in map(text_of, texts):
            if text and kind not in _NO_ERRORS and kind[0].isupper():
                yield Message(KINDS.get(kind, kind), " ".join(text.split()), module)
