"""Iteration over the direct submodules of a module."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from gift.core.dynamic_class import joined, plain_class


class Site(NamedTuple):
    """A module or parameter and where it is in the network: the arguments of checks and actions.

    Args:
        parent: module that holds the module; None for the network itself.
        name: name of the module in its parent.
        path: dotted path of the module from the network.
        class_name: name of its class before any adaptation.
        module: the module.
        parameter_name: name of the parameter in the module; "" for the module itself.
        parameter: the parameter; None for the module itself.
    """

    parent: nn.Module | None
    name: str
    path: str
    class_name: str
    module: nn.Module
    parameter_name: str = ""
    parameter: Any = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments that a check or action gets: five for a module, seven for a parameter."""
        return self if self.parameter_name else self[:5]

    @property
    def full_path(self) -> str:
        """The dotted path of the parameter or module."""
        return joined(self.path, self.parameter_name) if self.parameter_name else self.path

    def in_words(self) -> str:
        """The path, or "the network"."""
        return self.full_path or "the network"


ModuleEntry = tuple[str, str, str, nn.Module, bool]


class ModuleIterator:
    """The direct submodules of a module, in registration order; can be iterated again.

    Yields ``(current_name, global_name, class_name, current_module, has_children)``.
    ``global_name`` is ``parent_name`` and the name of the submodule joined by a dot. ``class_name``
    is the name of its class before any adaptation. Submodules that are None are skipped.

    Args:
        module: the module whose submodules are wanted.
        parent_name: dotted path of `module`; "" gives names without a leading dot.

    Raises:
        TypeError: if `module` is not a module.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 5), nn.Sequential(nn.Linear(6, 2)))
        >>> [(name, has_children) for _, name, _, _, has_children in ModuleIterator(net, "net")]
        [('net.0', False), ('net.1', True)]
    """

    def __init__(self, module: nn.Module, parent_name: str = "") -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.parent_name = parent_name

    def __len__(self) -> int:
        return sum(child is not None for child in self.module._modules.values())

    def __iter__(self) -> Iterator[ModuleEntry]:
        for name, child in self.module._modules.items():
            if child is not None:
                path = joined(self.parent_name, name)
                has_children = any(c is not None for c in child._modules.values())
                yield name, path, plain_class(type(child)).__name__, child, has_children


def named_parts(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """`named_modules` as a list, with a fast path for a module without submodules."""
    return list(module.named_modules(prefix=prefix)) if module._modules else [(prefix, module)]
