"""The weights that a start sets, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from gift.core.dynamic_class import joined
from gift.core.weights.record import WeightDelta, present_weight_deltas

REFUSED = "nothing was initialised, the network is unchanged"


@dataclass(frozen=True)
class Initialised:
    """What a start did; it prints as a table.

    Args:
        start: its name.
        batches: the number of batches that it saw.
        shares: for each layer, the part of what data say that its factors hold, between 0 and 1:
            of the second moment of the inputs (EVA), of the squared singular values of weight times
            moment (CorDA) or of the gradient (LoRA-GA). For `loftq`, of the squared error of
            quantising.
        left: adapted weights that keep their start: other layer types, other methods, layers that
            the batches did not reach.
    """

    start: str
    batches: int
    shares: dict[str, float]
    left: list[str]

    def __str__(self) -> str:
        rows = [(path, f"{share:.1%}") for path, share in self.shares.items()]
        rows += [(path, "as it was") for path in self.left]
        return tabulate(rows, headers=["weight", f"share, {self.start}"], disable_numparse=True)


Places = dict[str, tuple[nn.Module, WeightDelta]]


def places_of(
    network: nn.Module, fits: Callable[[nn.Module, WeightDelta], bool]
) -> tuple[Places, list[str]]:
    """Return the weights of layers that a start can set, and the paths of all other adapted ones.

    Args:
        network: the network.
        fits: whether a start can set the delta of a layer's weight, given both.
    """
    places: Places = {}
    left: list[str] = []
    for path, module in network.named_modules():
        for tensor, delta in present_weight_deltas(module).items():
            if delta.owner is not None:
                continue
            if tensor == "weight" and delta.layout is not None and fits(module, delta):
                places[joined(path, tensor)] = module, delta
            else:
                left.append(joined(path, tensor))
    return places, left
