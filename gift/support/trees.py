"""Trees of modules, as text, in colours, and as HTML for notebooks."""

import html
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from tabulate import tabulate

COLOURS = {"trained": "green", "adapted": "blue", "frozen": "bright_black"}
"""Colour of each state in terminals."""

_STYLE = (
    "<style>.gift-tree ul{list-style:none;margin:0;padding-left:1.2em}"
    ".gift-tree summary{cursor:pointer}.gift-trained{color:#2c8a57}.gift-adapted{color:#1f6fb4}"
    ".gift-frozen{opacity:.6}</style>"
)


@dataclass
class Node:
    """A module in a tree.

    Args:
        name: its name in the module above.
        text: what is said of it.
        state: "trained", "adapted", "frozen", or "" if its parts differ.
        children: the modules in it.
    """

    name: str
    text: str = ""
    state: str = ""
    children: list["Node"] = field(default_factory=list)

    def at(self, path: str) -> "Node":
        """Return the node at a dotted path below this one; it is created if necessary."""
        here = self
        for name in path.split(".") if path else ():
            found = next((child for child in here.children if child.name == name), None)
            if found is None:
                found = Node(name)
                here.children.append(found)
            here = found
        return here

    def find(self, path: str) -> "Node | None":
        """Return the node at a dotted path below this one, if there is one."""
        here = self
        for name in path.split(".") if path else ():
            found = next((child for child in here.children if child.name == name), None)
            if found is None:
                return None
            here = found
        return here

    def settle(self) -> None:
        """Give each node without a state that of its parts, if they agree."""
        for child in self.children:
            child.settle()
        states = {child.state for child in self.children}
        if not self.state and len(states) == 1:
            [self.state] = states


def condensed(node: Node) -> Node:
    """Return the tree with equal neighbours as one: twelve layers become ``[0-11] 12 x``.

    What is frozen as a whole has no children.
    """
    if node.state == "frozen":
        return Node(node.name, node.text, node.state)
    groups: list[list[Node]] = []
    for child in node.children:
        child = condensed(child)
        if groups and _alike(groups[-1][-1], child):
            groups[-1].append(child)
        else:
            groups.append([child])
    return Node(node.name, node.text, node.state, [_merged(group) for group in groups])


def _alike(one: Node, other: Node) -> bool:
    """Whether two numbered modules differ in nothing but their numbers."""
    return one.name.isdecimal() and other.name.isdecimal() and _shape(one) == _shape(other)


def _shape(node: Node) -> object:
    return node.text, node.state, [(child.name, _shape(child)) for child in node.children]


def _merged(group: Sequence[Node]) -> Node:
    first = group[0]
    if len(group) == 1:
        return first
    name = f"[{first.name}-{group[-1].name}]"
    text = f"{len(group)} x {first.text}".strip()
    return Node(name, text, first.state, first.children)


def as_text(node: Node, colours: bool | None = None) -> str:
    """Return a tree as lines, in colours for a terminal.

    Args:
        node: the tree.
        colours: whether to use colours; None does so if standard output is a terminal.
    """
    colours = sys.stdout.isatty() if colours is None else colours
    if colours and find_spec("rich") is not None:
        return _in_colours(node)
    return "\n".join(_lines(node))


def _lines(node: Node, before: str = "", below: str = "") -> Iterable[str]:
    yield before + _said(node)
    for place, child in enumerate(node.children):
        is_last = place == len(node.children) - 1
        first, then = ("└── ", "    ") if is_last else ("├── ", "│   ")
        yield from _lines(child, below + first, below + then)


def _said(node: Node) -> str:
    state = f"({node.state})" if node.state else ""
    return " ".join(part for part in (node.name, node.text, state) if part)


def _in_colours(node: Node) -> str:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def grown(one: Node, tree: Tree) -> Tree:
        for child in one.children:
            grown(child, tree.add(Text(_said(child), style=COLOURS.get(child.state, ""))))
        return tree

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=10_000)
    console.print(grown(node, Tree(Text(_said(node), style=COLOURS.get(node.state, "")))))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").splitlines())


def as_html(node: Node) -> str:
    """Return a tree as HTML, whose branches can be opened and closed."""
    return f'{_STYLE}<div class="gift-tree">{_branch(node, True)}</div>'


def _branch(node: Node, is_open: bool) -> str:
    name, text = html.escape(node.name), html.escape(_said(Node("", node.text, node.state)))
    said = f'<span class="gift-{node.state or "mixed"}"><b>{name}</b> {text}</span>'
    if not node.children:
        return said
    inner = "".join(
        f"<li>{_branch(child, child.state != 'frozen')}</li>" for child in node.children
    )
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{said}</summary><ul>{inner}</ul></details>"


def table_html(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Return rows as an HTML table; texts are escaped."""
    return str(tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True))


class Shown(str):
    """A text that notebooks show as HTML.

    Args:
        text: the text.
        to_html: returns the HTML; called only if it is asked for.
    """

    def __new__(cls, text: str, to_html: Callable[[], str]) -> "Shown":
        """Create the text."""
        made = super().__new__(cls, text)
        made._to_html = to_html
        return made

    _to_html: Callable[[], str]

    def _repr_html_(self) -> str:
        return self._to_html()
