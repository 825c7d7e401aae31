"""Make the deltas of a fine-tuned network part of the base of another strategy."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from gift.core.delta import Delta, deltas_of
from gift.core.forwards import ForwardDelta
from gift.core.weights.reading import Memory
from gift.core.weights.record import WeightDelta


def freeze_deltas(network: nn.Module) -> None:
    """Mark all deltas as part of the base; the records that were there stay as they are."""
    for module in network.modules():
        for key in ("_gift_weights", "_gift_forwards"):
            if (deltas := module.__dict__.get(key)) is not None:
                module.__dict__[key] = {name: _of_base(delta) for name, delta in deltas.items()}
    freeze_tensors_of_base(network)


def _of_base(delta: Delta) -> Delta:
    if isinstance(delta, WeightDelta):
        return replace(delta, of_base=True, memory=Memory())
    assert isinstance(delta, ForwardDelta)
    return replace(delta, of_base=True)


def freeze_tensors_of_base(network: nn.Module) -> None:
    """Freeze the parameters of deltas that belong to the base, whatever claimed their module."""
    for module in network.modules():
        for name in names_of_levels(module, of_base=True):
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad = False


def names_of_levels(module: nn.Module, of_base: bool) -> Iterator[str]:
    """Names of the tensors that `module` holds for the deltas that `levels_of` yields."""
    for _, delta in levels_of(module, of_base):
        if delta.owner is None:
            yield from delta.names.values()


def levels_of(module: nn.Module, of_base: bool) -> Iterator[tuple[str, Delta]]:
    """The deltas that `module` uses, those under others too, by the name of what they change.

    Args:
        module: the module.
        of_base: yield those of the base of the present strategy, not its own.
    """
    for key, delta in deltas_of(module).items():
        level: Delta | None = delta
        while level is not None:
            if level.of_base == of_base:
                yield key, level
            level = getattr(level, "below", None)
