"""The layers of a network that get a size each, and their shares of a budget."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from gift.budget.budget import Budget
from gift.budget.sizes import Sizes, last_that
from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import WeightDelta
from gift.engine.dry_run import Cost
from gift.errors import AdaptationError, refuse
from gift.factories.serializable import describe
from gift.methods import Method
from gift.strategies.base import Cap
from gift.strategies.sized import AdaptEach, Layer, setting_of
from gift.support.progress import slow


@lru_cache(maxsize=64)  # cached, since methods are equal only if they have the same class
def _open_class(cls: Any) -> type[Method]:
    """Make a subclass whose methods fit every shape and add nothing yet."""
    return type(
        cls.__name__,
        (cls,),
        {
            "derives": (),
            "fit": lambda self, shape: self,
            "init_parameters": lambda self, matrix: {
                "_gift_open": torch.empty(0, **self.factory_kwargs(matrix))
            },
            "effective_weight": lambda self, matrix, parameters: matrix,
        },
    )


class AdaptOpen(AdaptEach):
    """Collects the layers for which a size is to be chosen."""

    def __init__(self, cap: Cap, found: "list[tuple[Layer, Method]]") -> None:
        super().__init__(cap)
        self.found = found

    def method_at(self, layer: Layer) -> Method:
        """Return a method that adds nothing yet.

        Raises:
            AdaptationError: if the cost of the method is not the sum of those of single weights.
        """
        own: Any = type(self.method)
        if self.method.shared or own.init_bias_parameters is not Method.init_bias_parameters:
            raise AdaptationError(
                f"{self.method.name} has parameters that layers share, or that act on biases, so "
                "no budget can be divided among the layers: choose its size for all of them"
            )
        self.found.append((layer, self.method))
        method = object.__new__(_open_class(own))
        vars(method).update(vars(self.method))
        return method

    def __repr__(self) -> str:
        return describe(self.cap.action)


@dataclass
class Choice:
    """Layers that get one size: a single layer, or several that share a tensor.

    Args:
        paths: paths of the layers.
        sizes: the sizes that they can have.
        proportion: the size that the strategy gives them, which sets their proportion to others.
    """

    paths: list[str]
    sizes: Sizes
    proportion: int
    size: int = field(init=False, default=0)

    @property
    def cost(self) -> Cost:
        """The cost of these layers."""
        return self.sizes.cost(self.size)


def choices_for(found: list[tuple[Layer, Method]]) -> list[Choice]:
    """Return the choices to make, in the order of the network.

    Raises:
        AdaptationError: naming all layers that cannot be adapted with any size.
    """
    kinds: dict[Any, Sizes] = {}
    choices, problems = [], []
    for group in slow(_tied([layer for layer, _ in found]), "searching ranks"):
        layers, method = [found[number][0] for number in group], found[group[0]][1]
        adapted = [each for layer in layers for each in layer.adapted()]
        try:
            own = tuple(_weight(*each) for each in adapted if each[2].owner is None)
            sizes = kinds[method, own] = kinds.get((method, own)) or Sizes(method, own)
            choices.append(Choice([layer.path for layer in layers], sizes, _default_size(method)))
        except AdaptationError as error:
            problems.append(f"{layers[0].path or 'the network'}: {error}")
    refuse(AdaptationError, "no size would do, for", problems)
    return choices


def _tied(layers: list[Layer]) -> list[list[int]]:
    """Group the indices of layers that share a delta."""
    home: dict[Any, int] = {}
    groups = {number: [number] for number in range(len(layers))}
    for number, layer in enumerate(layers):
        for module, _, delta in layer.adapted():
            for name in delta.names.values():
                first = home.setdefault((delta.owner or module, name), number)
                if groups[first] is not groups[number]:
                    groups[first] += groups[number]
                    groups.update(dict.fromkeys(groups[number], groups[first]))
    unique = {id(group): sorted(group) for group in groups.values()}
    return sorted(unique.values())


def _weight(
    module: nn.Module, tensor: str, delta: WeightDelta
) -> tuple[tuple[int, ...], torch.dtype]:  # fmt: skip
    if delta.layout is None:
        raise AdaptationError(f"{tensor!r} has no shape yet: run a batch through the network first")
    return delta.layout.matrix, present_tensor(module, tensor).dtype


def _default_size(method: Method) -> int:
    size = getattr(method, setting_of(method))
    if size is None:  # the size for a matrix that can have any
        size = getattr(method.fit((2**16, 2**16)), setting_of(method))
    return size or 1


def choose(choices: list[Choice], fixed: Cost, budget: Budget) -> None:
    """Choose all sizes, see `suggest`; the least sizes must fit the budget."""

    def cost() -> Cost:
        return sum((choice.cost for choice in choices), fixed)

    largest = max(choice.proportion for choice in choices)

    def fits(level: int) -> bool:
        for choice in choices:
            choice.size = choice.sizes.at_most(level * choice.proportion // largest)
        return budget.allows(cost())

    top = max(choice.sizes.most * largest // choice.proportion + 1 for choice in choices)
    fits(last_that(0, top, fits))
    spent = cost()

    def grows(choice: Choice) -> bool:
        nonlocal spent
        larger = choice.sizes.above(choice.size)
        if not larger:
            return False
        before, after = choice.cost, choice.sizes.cost(larger)
        more = Cost(after.parameters - before.parameters, after.bytes - before.bytes)
        if not budget.allows(spent + more):
            return False
        choice.size, spent = larger, spent + more
        return True

    # What did not fit once cannot fit later, since the remaining budget only shrinks.
    growing = sorted(choices, key=lambda choice: -choice.sizes.elements)
    while growing:
        growing = [choice for choice in growing if grows(choice)]
