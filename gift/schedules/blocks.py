"""The division of a network: a head, and blocks in the order of the network."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gift.core.delta import added_names, deltas_of, present_deltas
from gift.core.dynamic_class import joined, plain_class
from gift.core.weights.record import weight_deltas
from gift.errors import closest
from gift.factories.heads import last_linear
from gift.private.torch.layers import NORM_WITH_STATISTICS

Paths = str | Iterable[str] | None
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """A unit that is unfrozen as a whole.

    Args:
        name: dotted path of a module, or of a single parameter.
        class_name: class of the module.
        parameters: names of its parameters, including those of deltas, without those of the head.
        norms: paths of the layers with running statistics in it.
    """

    name: str
    class_name: str
    parameters: tuple[str, ...]
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Division:
    """A network in parts; each parameter is in exactly one of them.

    Args:
        head: paths of the modules of the head.
        head_parameters: names of the head's parameters, and of all that are tied to them.
        blocks: blocks in the order of registration.
        rest: names of the parameters outside of head and blocks, if blocks were named.
        rest_norms: paths of the layers with running statistics outside of head and blocks.
    """

    head: tuple[str, ...]
    head_parameters: tuple[str, ...]
    blocks: tuple[Block, ...]
    rest: tuple[str, ...] = ()
    rest_norms: tuple[str, ...] = ()


def divide(net: nn.Module, head: Paths = None, blocks: Paths = None) -> Division:
    """Divide a network into head and blocks.

    Args:
        net: the network.
        head: dotted paths of modules; None is the last linear layer.
        blocks: dotted paths or globs of modules or parameters. None finds them: containers, and
            modules that contain rows of similar modules, are opened; everything else is a block,
            such as a layer, a residual block or an encoder layer.

    Raises:
        ValueError: naming paths that are not in the network.
    """
    heads = _heads(net, head)
    names = {id(p): name for name, p in net.named_parameters()}
    own = {id(p) for path in heads for p in _with_deltas(net.get_submodule(path))}
    units = _Finder(net, heads).units() if blocks is None else _named(net, blocks)
    claimed, found = set(own), []
    for name, module, parameters in units:
        new = [p for p in parameters if id(p) not in claimed]
        claimed |= {id(p) for p in new}
        if new:
            norms = () if isinstance(module, nn.Parameter) else tuple(_norms(module, name, heads))
            kind = plain_class(type(module)).__name__
            order = {id(p): None for p in new}
            found.append(Block(name, kind, tuple(names[key] for key in order), norms))
    rest = tuple(name for key, name in names.items() if key not in claimed)
    mine = tuple(name for key, name in names.items() if key in own)
    still = {path for block in found for path in block.norms}
    others = tuple(path for path in _norms(net, "", heads) if path not in still)
    return Division(heads, mine, tuple(found), rest, others)


Unit = tuple[str, Any, list[nn.Parameter]]


def _with_deltas(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters in a module, and those of deltas that are stored with a tied tensor."""
    yield from nn.Module.parameters(module)
    for part in module.modules():
        for delta in deltas_of(part).values():
            yield from (t for t in delta.tensors(part).values() if isinstance(t, nn.Parameter))


def _heads(net: nn.Module, head: Paths) -> tuple[str, ...]:
    if head is None:
        path, last = last_linear(net)
        if last is None:
            raise ValueError(
                f"{type(net).__name__} has no linear layer and no 1x1 convolution, which would be "
                "its head: say which module it is, head=..."
            )
        return (path,)
    paths = tuple(_listed(head))
    known = dict(net.named_modules(remove_duplicate=False))
    wrong = [path for path in paths if path not in known]
    if wrong or not paths:
        raise ValueError(f"there is no module {wrong} for a head{_closest(wrong, known)}")
    empty = [path for path in paths if not any(True for _ in nn.Module.parameters(known[path]))]
    if empty:
        raise ValueError(f"{empty} for a head have no parameters")
    return paths


def _listed(paths: Paths) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths or ())


def _closest(wrong: Iterable[str], known: Iterable[str]) -> str:
    known = list(known)
    close = [match for path in wrong for match in closest(path, known)]
    return f"; closest names: {close}" if close else ""


def _norms(module: nn.Module, path: str, heads: tuple[str, ...]) -> Iterator[str]:
    for name, part in module.named_modules(prefix=path):
        inside = any(name == head or name.startswith(f"{head}.") for head in heads)
        if isinstance(part, NORM_WITH_STATISTICS) and part.track_running_stats and not inside:
            yield name


def _named(net: nn.Module, blocks: Paths) -> Iterator[Unit]:
    """Yield the units at these paths; of nested ones, only the outermost."""
    patterns = _listed(blocks)
    named: dict[str, Any] = dict(net.named_modules()) | dict(net.named_parameters())
    paths = [name for name in named if name]
    unused = [p for p in patterns if not any(fnmatchcase(path, p) for path in paths)]
    if unused or not patterns:
        raise ValueError(f"no module is named as in blocks {unused}{_closest(unused, paths)}")
    found: list[str] = []
    for path in [name for name, _ in _in_order(net, "")]:
        inside = any(path.startswith(f"{other}.") for other in found)
        if path and not inside and any(fnmatchcase(path, p) for p in patterns):
            found.append(path)
            part = named[path]
            alone = isinstance(part, nn.Parameter)
            yield path, part, [part] if alone else list(nn.Module.parameters(part))


def _in_order(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """Yield modules and parameters in the order of registration."""
    seen: set[int] = set()

    def walk(part: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
        if id(part) in seen:
            return
        seen.add(id(part))
        yield path, part
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield joined(path, name), parameter
        for name, child in part.named_children():
            yield from walk(child, joined(path, name))

    yield from walk(module, path)


class _Finder:
    """Finds blocks.

    A class is a kind of block if two of its instances in one container, or three that are also
    most of another module, have parameters of the same shapes. Encoder layers and residual blocks
    do. The stages of a hierarchical network do not, because each is wider than the one before.
    """

    def __init__(self, net: nn.Module, heads: Iterable[str]) -> None:
        self.net = net
        self.kinds: set[type] = set()
        self.alike: set[int] = set()  # containers beside others with the same structure
        for parent in net.modules():
            looks = {child: _look(child) for child in _children(parent) if _is_composite(child)}
            counts = Counter(looks.values())
            enough = 2 if isinstance(parent, _CONTAINERS) else max(3, len(looks) // 2 + 1)
            rows = [child for child, look in looks.items() if counts[look] >= enough]
            self.alike |= {id(child) for child in rows if _is_container(child)}
            self.kinds |= {plain_class(type(child)) for child in rows if not _is_container(child)}
        self.opened = {id(net)}  # and everything that contains a head or a kind of block
        inner = [net.get_submodule(path) for path in heads]
        inner += [m for m in net.modules() if plain_class(type(m)) in self.kinds]
        targets = {id(module) for module in inner}
        self._open_above(net, targets)

    def _open_above(self, module: nn.Module, targets: set[int]) -> bool:
        """Whether one of the targets is in `module`, which is then opened."""
        below = [self._open_above(child, targets) for child in module.children()]
        if any(below):
            self.opened.add(id(module))
        return any(below) or id(module) in targets

    def units(self) -> Iterator[Unit]:
        """Return the blocks with their parameters, including those of the head.

        If this gives a single block, that block is opened as well.
        """
        while True:
            units = list(self._walk(self.net, "", set()))
            composite = [m for _, m, _ in units if not isinstance(m, nn.Parameter)]
            composite = [m for m in composite if _is_composite(m) and id(m) not in self.opened]
            heads = sum(1 for _, m, _ in units) - len(composite)
            if len(composite) != 1 or heads > 1:
                return iter(units)
            self.opened.add(id(composite[0]))

    def _is_opened(self, module: nn.Module) -> bool:
        if module is self.net:
            return True
        if plain_class(type(module)) in self.kinds or not _is_composite(module):
            return False
        return id(module) in self.opened or (_is_container(module) and id(module) not in self.alike)

    def _walk(self, module: nn.Module, path: str, seen: set[int]) -> Iterator[Unit]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if not self._is_opened(module):
            if parameters := list(nn.Module.parameters(module)):
                yield path, module, parameters
            return
        yield from _alone(module, path)
        for name, child in module.named_children():
            yield from self._walk(child, joined(path, name), seen)


def _alone(module: nn.Module, path: str) -> Iterator[Unit]:
    """Yield the parameters directly on an opened module, each with its delta."""
    added, groups = set(added_names(module)), dict[str, list[str]]()
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in added:
            groups[name] = [name]
    for key, delta in present_deltas(module).items():
        if own := [n for n in delta.names.values() if n in module._parameters and n in added]:
            first = key if key in groups and key in weight_deltas(module) else own[0]
            groups.setdefault(first, []).extend(n for n in own if n not in groups.get(first, ()))
    for name, names in groups.items():
        parameters = [p for n in names if (p := module._parameters[n]) is not None]
        yield joined(path, name), parameters[0], parameters


def _children(module: nn.Module) -> list[nn.Module]:
    """Return the submodules, without those that compute a parametrized weight."""
    return [m for name, m in module.named_children() if name != "parametrizations"]


def _is_composite(module: nn.Module) -> bool:
    parts = _children(module)
    return any(next(nn.Module.parameters(part), None) is not None for part in parts)


def _is_container(module: nn.Module) -> bool:
    return plain_class(type(module)) in _CONTAINERS


def _look(module: nn.Module) -> tuple[Any, ...]:
    """Return the class, and names and shapes of the parameters without deltas."""
    shapes = [
        (joined(path, name), None if is_lazy(parameter) else parameter.shape)
        for path, part in module.named_modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and name not in added_names(part)
    ]
    return plain_class(type(module)), *shapes
