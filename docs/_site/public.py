"""The public names of gift, read from its source without importing it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent

ROOMS = {
    "gift": "Enable, save, load, merge",
    "gift.strategies": "Strategies",
    "gift.factories": "Checks and actions",
    "gift.methods": "Methods",
    "gift.wrappers": "Bottlenecks, prompts, activated LoRA",
    "gift.budget": "Sizes for a budget",
    "gift.starts": "Starts that look at data",
    "gift.schedules": "Schedules",
    "gift.bank": "Many deltas on one base",
    "gift.files": "Files",
    "gift.interop.diffusers": "Files of diffusers",
    "gift.interop.kohya": "Files of kohya",
    "gift.training": "Training",
    "gift.data": "Data",
    "gift.zoo": "Networks by name",
    "gift.jobs": "Jobs",
    "gift.many": "Search and compare",
    "gift.utils.info": "Tables and summaries",
    "gift.utils.network_tool": "Tools for networks",
    "gift.errors": "Errors and warnings",
}
"""The rooms that users import from, and the title of the page of each, in the order of the pages.

A name that two of them give is shown in the first.
"""

MORE = {
    "gift.schedules": ["gift.schedules.lightning", "gift.schedules.transformers"],
    "gift.methods": ["gift.methods.base"],
}
"""Modules whose classes stand on the page of a room that does not import them."""

CLASSES_ONLY = {"gift.errors", "gift.methods.base", *MORE["gift.schedules"]}
"""Modules whose functions are for other rooms of gift."""

INSIDE = {
    "gift.core.merging",
    "gift.data.readers",
    "gift.interop",
    "gift.quantization",
    "gift.strategies.lora",
    "gift.strategies.of_methods",
    "gift.training.report",
    "gift.training.tasks",
}
"""Modules with an ``__all__`` for other rooms of gift, or whose names another page has."""


class Public(NamedTuple):
    """One public name.

    Args:
        room: module that gives it to users.
        name: its name there.
        origin: dotted path of its definition.
        kind: "class", "function" or "attribute".
        documented: whether it has a docstring.
    """

    room: str
    name: str
    origin: str
    kind: str
    documented: bool

    @property
    def path(self) -> str:
        """The dotted path that the reference shows it under.

        A function with the name of its module is shown where it is defined, since the path through
        a package would be that of the module.
        """
        same = self.origin.split(".")[-2] == self.name
        return self.origin if same else f"{self.room}.{self.name}"


class Registered(NamedTuple):
    """One registered method.

    Args:
        name: name that selects it, ``lora``.
        title: prefix of its strategies, ``LoRA``.
        cls: name of its class.
        module: module that defines it.
        doc: its docstring.
    """

    name: str
    title: str
    cls: str
    module: str
    doc: str


def file_of(module: str) -> Path:
    """The source file of a module."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


@cache
def all_of(module: str) -> list[str]:
    """The names in the ``__all__`` of a module; without one, those that it imports or defines.

    Names that are made at run time, as the strategies of the methods are, are left out.
    """
    tree = tree_of(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            assert isinstance(node.value, ast.List | ast.Tuple | ast.Call), module
            items = getattr(node.value, "elts", [])
            return [item.value for item in items if isinstance(item, ast.Constant)]
    names = (
        [name for name, _ in _imported(tree, module)] if file_of(module).stem == "__init__" else []
    )
    return names + [name for name, *_ in _defined(tree)]


@cache
def public_names() -> list[Public]:
    """All public names, each once, in the order of the rooms."""
    found: dict[str, Public] = {}
    for room in ROOMS:
        for module in [room, *MORE.get(room, [])]:
            for name in all_of(module):
                origin, kind, documented = resolve(module, name)
                if module in CLASSES_ONLY and kind != "class":
                    continue
                found.setdefault(origin, Public(module, name, origin, kind, documented))
    return list(found.values())


def resolve(module: str, name: str) -> tuple[str, str, bool]:
    """The path of the definition of a name, its kind, and whether it has a docstring."""
    tree = tree_of(module)
    for defined, kind, documented in _defined(tree):
        if defined == name:
            return f"{module}.{name}", kind, documented
    for given, source in _imported(tree, module):
        if given == name:
            return resolve(*source)
    raise LookupError(f"{module} does not define {name}, nor import it from gift")


def _defined(tree: ast.Module) -> Iterator[tuple[str, str, bool]]:
    """Public classes, functions and attributes of a module."""
    for index, node in enumerate(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if not node.name.startswith("_"):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                yield node.name, kind, ast.get_docstring(node) is not None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            after = tree.body[index + 1] if index + 1 < len(tree.body) else None
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                yield target.id, "attribute", text


def _imported(tree: ast.Module, module: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that a module imports from gift, and where from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gift"):
            for alias in node.names:
                if alias.name != "*":
                    yield alias.asname or alias.name, (str(node.module), alias.name)


def registered_methods() -> list[Registered]:
    """The registered methods, in the order of their files."""
    found = []
    for file in sorted((ROOT / "gift" / "methods").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.ClassDef):
                continue
            if "register_method" not in map(ast.unparse, node.decorator_list):
                continue
            values = {
                ast.unparse(line.target): line.value.value
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Constant)
            }
            found.append(
                Registered(
                    str(values["name"]),
                    str(values["strategy_prefix"]),
                    node.name,
                    f"gift.methods.{file.stem}",
                    ast.get_docstring(node) or "",
                )
            )
    return found
