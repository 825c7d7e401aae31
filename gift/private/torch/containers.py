"""Nested containers of tensors: torch's pytrees."""

from collections.abc import Callable
from typing import Any

from gift.private.torch.parts import part

PARTS = (
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_leaves",
)


def tree_map(function: Callable[..., Any], tree: Any) -> Any:
    """Apply `function` to each leaf of nested containers and return containers of the same types.

    torch's own version knows the containers that other libraries have registered. The fallback
    knows lists, tuples and dictionaries.
    """
    own = part("torch.utils._pytree.tree_map")
    return _mapped(function, tree) if own is None else own(function, tree)


def _mapped(function: Callable[..., Any], tree: Any) -> Any:
    kind = type(tree)
    if isinstance(tree, dict):
        pairs = [(key, _mapped(function, value)) for key, value in tree.items()]
        made = (tree.default_factory,) if hasattr(tree, "default_factory") else ()
        return kind(*made, pairs)
    if isinstance(tree, list | tuple):
        values = [_mapped(function, value) for value in tree]
        return kind(*values) if hasattr(tree, "_fields") else kind(values)
    return function(tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested containers, by the rules of `tree_map`."""
    own = part("torch.utils._pytree.tree_leaves")
    if own is not None:
        return list(own(tree))
    leaves: list[Any] = []
    _mapped(leaves.append, tree)
    return leaves
