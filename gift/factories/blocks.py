"""The blocks of a network: consecutive modules of one class."""

from torch import nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.iterator import Site
from gift.errors import AdaptationError
from gift.factories.checks import Check, Test
from gift.factories.serializable import recorded

_NO_BLOCKS = (
    "has no nn.Sequential or nn.ModuleList of modules of one class: say which modules are its "
    "blocks"
)


@recorded
def mc_blocks() -> Check:
    """Match the blocks of a network: consecutive modules of one class.

    The blocks' class is that of the longest ``nn.Sequential`` or ``nn.ModuleList`` whose modules,
    apart from those without parameters, all have one class (encoder layers, residual blocks of a
    stage). All such containers of that class count. A network without blocks is an error.
    """

    def prepare(network: nn.Module) -> Test:
        rows = [row for part in network.modules() if (row := _row(part))]
        longest = max(rows, key=len, default=[])
        if len(longest) < 2:
            raise ValueError(f"the network {_NO_BLOCKS}")
        kind = plain_class(type(longest[0]))
        blocks = {id(b) for row in rows for b in row if plain_class(type(b)) is kind}
        return lambda *place: id(Site(*place).module) in blocks

    return Check(prepare=prepare)


def stack_of(network: nn.Module, path: str | None) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a network, which are called one after another, with their paths.

    Args:
        network: the network.
        path: path of the container of the blocks; None finds it as `mc_blocks` does.

    Raises:
        AdaptationError: if the network has no such container, or one in each of several stages.
    """
    if path is not None:
        try:
            rows = {path: [*network.get_submodule(path).children()]}
        except AttributeError:
            raise AdaptationError(f"it has no {path!r}, which blocks= names") from None
    else:
        rows = {name: row for name, part in network.named_modules() if (row := _row(part))}
    longest = max(rows.values(), key=len, default=[])
    if not longest:
        raise AdaptationError(_NO_BLOCKS)
    kind = plain_class(type(longest[0]))
    alike = [name for name, row in rows.items() if plain_class(type(row[0])) is kind]
    if len(alike) > 1:
        raise AdaptationError(f"its blocks are in several stages, {alike}: say which, blocks=")
    (name,) = alike
    return [(joined(name, own), part) for own, part in network.get_submodule(name).named_children()
            if part in longest]  # fmt: skip


def _row(module: nn.Module) -> list[nn.Module]:
    """Return a container's modules that have parameters, if all are of one class, or nothing."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return []
    parts = [part for part in module.children() if any(True for _ in part.parameters())]
    return parts if len({plain_class(type(part)) for part in parts}) == 1 else []
