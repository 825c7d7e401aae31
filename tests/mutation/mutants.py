"""Find what can be broken in a module, one place at a time."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Edit = Callable[[], Any]  # what stands in the place of a node

COMPARED: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
}  # fmt: skip
COMPUTED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}  # fmt: skip
DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Continue)


@dataclass(frozen=True)
class Mutant:
    """One change of a module.

    Args:
        module: path of its file.
        line: number of the line.
        text: the line.
        what: what is changed.
        number: of the change, in the order of `changes`.
        function: the innermost one around it, as "path: qualified name".
    """

    module: str
    line: int
    text: str
    what: str
    number: int
    function: str

    @property
    def lasting(self) -> str:
        """What it is called as long as its line stays as it is, wherever the line moves."""
        return f"{self.module}: {self.what}: {self.text}"

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.what}: {self.text}"


def mutants(module: str, source: str) -> list[Mutant]:
    lines, tree = source.splitlines(), ast.parse(source)
    inside = _functions(tree)
    found = enumerate(changes(tree))
    return [Mutant(module, n.lineno, lines[n.lineno - 1].strip(), what, number,
                   f"{module}: {inside[id(n)]}") for number, (n, what, _) in found]  # fmt: skip


def _functions(tree: ast.Module) -> dict[int, str]:
    """For each node inside of functions, by its id, the qualified name of the innermost one."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                name = f"{prefix}{child.name}"
                found.update((id(n), name) for part in child.body for n in ast.walk(part))
                visit(child, f"{name}.<locals>.")
            else:
                visit(
                    child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
                )

    visit(tree, "")
    return found


def mutated(source: str, number: int) -> ast.Module:
    """The module with the change of that number."""
    tree = ast.parse(source)
    node, _, edit = list(changes(tree))[number]
    made = edit()

    class Put(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> Any:
            return made if other is node else self.generic_visit(other)

    changed = ast.fix_missing_locations(Put().visit(tree))
    compile(changed, "", "exec")
    return changed


def changes(tree: ast.Module) -> Iterator[tuple[Any, str, Edit]]:
    """The nodes of functions that can be changed, what is changed, and what stands there then."""
    skipped = {id(inner) for node in ast.walk(tree) for part in _unread(node)
               for inner in ast.walk(part)}  # fmt: skip
    inside = _functions(tree)
    for node in ast.walk(tree):
        if id(node) in inside and id(node) not in skipped:
            yield from ((node, what, edit) for what, edit in _changes_of(node))


def _unread(node: ast.AST) -> Iterator[ast.AST]:
    """Annotations, docstrings, the texts of errors and warnings, and what cannot be wrong."""
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
        yield from (a.annotation for a in arguments if a.annotation is not None)
        yield from [node.returns] if node.returns is not None else []
    elif isinstance(node, ast.AnnAssign):
        yield node.annotation
    elif isinstance(node, ast.JoinedStr | ast.Assert) or _is_docstring(node):
        yield node
    elif isinstance(node, ast.Raise) and node.exc is not None:
        yield node.exc
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
        yield from node.keywords  # ``strict=True`` checks lengths that agree


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _with(node: Any, **fields: Any) -> Edit:
    def edit() -> Any:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    return edit


def _joined(node: ast.BoolOp, values: list[ast.expr]) -> ast.expr:
    return values[0] if len(values) == 1 else ast.BoolOp(node.op, values)


def _is_nothing(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _changes_of(node: Any) -> Iterator[tuple[str, Edit]]:
    if isinstance(node, DROPPED):
        yield "dropped", lambda: ast.copy_location(ast.Pass(), node)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negated", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) and (
        node.generators[0].ifs
    ):
        first, *rest = node.generators
        plain = ast.comprehension(first.target, first.iter, [], first.is_async)
        yield "without its if", _with(node, generators=[plain, *rest])
    elif isinstance(node, ast.BoolOp):
        yield "the last left out", lambda: _joined(node, node.values[:-1])
        yield "the first left out", lambda: _joined(node, node.values[1:])
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        yield "compared otherwise", _with(node, ops=[COMPARED[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield "computed otherwise", _with(node, op=COMPUTED[type(node.op)]())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{not node.value}", _with(node, value=not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield f"{node.value + 1}", _with(node, value=node.value + 1)
    elif isinstance(node, ast.Return) and not _is_nothing(node.value):
        yield "None", _with(node, value=ast.Constant(None))
