"""Choosing sizes: the largest ranks, layer by layer, that a budget allows."""

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from gift.adapter import Adapter, present_tensor
from gift.claims import size_of
from gift.factories.recorded import describe
from gift.methods import AdaptationError, Method
from gift.rehearsal import Cost, cost_of, on_meta, rehearsed
from gift.strategies import STRATEGIES
from gift.strategies.base import Cap, FineTuningStrategy
from gift.strategies.sized import (
    AdaptEach,
    Layer,
    SizedStrategy,
    rewritten,
    setting_of,
    with_size,
)

# --- budgets ------------------------------------------------------------------------------------

_PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """A number of parameters, or of bytes."""

    limit: int
    in_bytes: bool = False

    @staticmethod
    def of(given: Any, total: int) -> "Budget":
        """The budget that a user means, for a network of `total` parameters.

        Raises:
            ValueError, TypeError: if it is none.
        """
        wrong = ValueError(
            f"the budget is {given!r}, expected a positive number of parameters (100_000, '100k', "
            "'1.5M'), a share of them ('1%', or a number below 1), or a size ('2MB')"
        )
        if isinstance(given, bool) or not isinstance(given, Real | str):
            raise TypeError(str(wrong))
        if isinstance(given, str):
            found = re.fullmatch(r"([\d_]+(?:\.\d+)?|\.\d+)\s*(%|[a-z]*)", given.strip().lower())
            if found is None or found[1].strip("_") == "":
                raise wrong
            amount, unit = Decimal(found[1].replace("_", "")), found[2]
        elif isinstance(given, Integral):
            amount, unit = Decimal(int(given)), ""
        elif math.isfinite(given) and (float(given) < 1 or float(given).is_integer()):
            amount, unit = Decimal(str(float(given))), "" if float(given) >= 1 else "share"
        else:
            raise wrong
        shares = {"share": Decimal(total), "%": Decimal(total) / 100}
        factors: dict[str, Any] = _PARAMETERS | _BYTES | shares
        if unit not in factors or amount <= 0:
            raise wrong
        return Budget(int(amount * factors[unit]), unit in _BYTES)

    def allows(self, cost: Cost) -> bool:
        """Whether that is not too much."""
        return (cost.bytes if self.in_bytes else cost.parameters) <= self.limit

    def told(self, cost: Cost) -> str:
        """The cost as text that is a budget."""
        return f"{cost.bytes / 1e6:.6f}MB" if self.in_bytes else f"{cost.parameters:_}"


# --- sizes of one kind of layer -----------------------------------------------------------------


class Sizes:
    """The sizes that a method can have for a layer, and what each costs.

    They are found by asking: some methods refuse what does not divide a side of the matrix, or
    is odd. Neighbours are asked for as far as `_NEAR`, then the divisors of the sides.

    Args:
        method: the method, of any size.
        weights: shape as matrix, and dtype, of the weights that get one size.

    Raises:
        AdaptationError: if there is none.
    """

    def __init__(
        self, method: Method, weights: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    ) -> None:
        self.method = method
        self.weights = weights
        self.elements = sum(math.prod(shape) for shape, _ in weights)
        sides = {side for shape, _ in weights for side in shape[-2:]}
        self._longest = max(sides)
        self._divisors = sorted({divisor for side in sides for divisor in _divisors(side)})
        self._costs: dict[int, tuple[Cost, int]] = {}
        self._settled: dict[int, int | None] = {}
        self._reason = ""
        self.least = self._above(0)
        if not self.least:
            raise AdaptationError(self._reason or f"{method} fits no size")
        self.most = self._down(_last(self.least, self.elements, self._is_useful))
        full = self.cost(self.most)
        if full == self.cost(self.least):
            self.most = self.least
        else:  # larger ones that add nothing are of no use either
            cheaper = _last(self.least, self.most, lambda size: self.cost(self._down(size)) < full)
            self.most = self._above(cheaper)

    def cost(self, size: int) -> Cost:
        """What the layer costs with a size that it can have."""
        return self._costed(size)[0]

    def at_most(self, size: int) -> int:
        """The largest size that is no larger than that; the least there is, if none."""
        return self._down(min(max(size, self.least), self.most))

    def above(self, size: int) -> int:
        """The next larger size; 0 if there is none."""
        return 0 if size >= self.most else self._above(size)

    def _above(self, size: int) -> int:
        near = range(size + 1, size + 1 + _NEAR)
        far = self._divisors[bisect_left(self._divisors, size + 1 + _NEAR) :]
        return next((larger for larger in (*near, *far) if self._takes(larger)), 0)

    def _down(self, size: int) -> int:
        settled = self._settle(size)
        if settled is None and self._takes(self._longest + 1):
            # What need not divide a side is refused only where it is too large.
            return _last(self._longest + 1, size, self._takes)
        if settled is not None and settled <= size:
            return settled
        near = range(size, max(size - _NEAR, self.least), -1)
        far = self._divisors[: bisect_left(self._divisors, size)]
        found = (smaller for smaller in (*near, *reversed(far)) if self._takes(smaller))
        return next((smaller for smaller in found if smaller > self.least), self.least)

    def _takes(self, size: int) -> bool:
        return self._settle(size) == size

    def _settle(self, size: int) -> int | None:
        """What becomes of a size that is asked for; None if it is refused."""
        if size not in self._settled:
            fitted = self._fitted(size)
            sizes = [getattr(method, setting_of(method)) for method in fitted]
            self._settled[size] = max(sizes, default=None)
        return self._settled[size]

    def _fitted(self, size: int) -> list[Method]:
        try:
            method = with_size(self.method, size)
            return [method.fit(shape) for shape, _ in self.weights]
        except ValueError as error:
            if isinstance(error, AdaptationError):
                self._reason = self._reason or str(error)
            return []

    def _is_useful(self, size: int) -> bool:
        """Whether no delta becomes larger than its weight that was smaller."""
        return self._costed(self._down(size))[1] <= self._costed(self.least)[1]

    def _costed(self, size: int) -> tuple[Cost, int]:
        """The cost, and the number of weights that have fewer parameters than their delta."""
        if size not in self._costs:
            total, larger = Cost(), 0
            for method, (shape, dtype) in zip(self._fitted(size), self.weights, strict=True):
                with torch.no_grad():
                    made = method.init(torch.empty(shape, dtype=dtype, device="meta")).values()
                trained = [t for t in made if not isinstance(t, nn.Buffer)]
                saved = [t for t in made if not isinstance(t, nn.Buffer) or t.persistent]
                count = sum(t.numel() for t in trained)
                total += Cost(count, sum(t.numel() * t.element_size() for t in saved))
                larger += count > math.prod(shape)
            self._costs[size] = total, larger
        return self._costs[size]


_NEAR = 64


def _divisors(number: int) -> set[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The last number for which it holds: it does for `low`, and once it does not, no more."""
    high = max(low, high)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


# --- strategies whose sizes are open ------------------------------------------------------------


@lru_cache(maxsize=64)  # one class for each, so that methods of it can be equal
def _open_class(cls: Any) -> type[Method]:
    """Methods like these which fit every shape and add nothing yet."""
    return type(
        cls.__name__,
        (cls,),
        {
            "fit": lambda self, shape: self,
            "init": lambda self, matrix: {"_gift_open": torch.empty(0, **self.like(matrix))},
            "weight": lambda self, matrix, parameters: matrix,
        },
    )


class _AdaptOpen(AdaptEach):
    """Finds the layers for which a size is to be chosen."""

    def __init__(self, cap: Cap, found: "list[tuple[Layer, Method]]") -> None:
        super().__init__(cap)
        self.found = found

    def method_at(self, layer: Layer) -> Method:
        self.found.append((layer, self.method))
        own: Any = type(self.method)
        method = object.__new__(_open_class(own))
        vars(method).update(vars(self.method))
        return method

    def __repr__(self) -> str:
        return describe(self.cap.action)


# --- layers that get one size -------------------------------------------------------------------


@dataclass
class Choice:
    """Layers that get one size: one, or several that share a tensor.

    Args:
        paths: of the layers.
        sizes: what they can have.
        proportion: the size that the strategy gives them, to which others' are in proportion.
    """

    paths: list[str]
    sizes: Sizes
    proportion: int
    size: int = field(init=False, default=0)

    @property
    def cost(self) -> Cost:
        """What they cost."""
        return self.sizes.cost(self.size)


def _choices(found: list[tuple[Layer, Method]]) -> list[Choice]:
    """What is to be chosen, in the order of the network.

    Raises:
        AdaptationError: naming all that cannot be adapted with any size.
    """
    kinds: dict[Any, Sizes] = {}
    choices, problems = [], []
    for group in _tied([layer for layer, _ in found]):
        layers, method = [found[number][0] for number in group], found[group[0]][1]
        adapted = [each for layer in layers for each in layer.adapted()]
        try:
            own = tuple(_weight(*each) for each in adapted if each[2].owner is None)
            sizes = kinds[method, own] = kinds.get((method, own)) or Sizes(method, own)
            choices.append(Choice([layer.path for layer in layers], sizes, _default_size(method)))
        except AdaptationError as error:
            problems.append(f"{layers[0].path or 'the network'}: {error}")
    if problems:
        raise AdaptationError("no size would do, for:\n  " + "\n  ".join(problems))
    return choices


def _tied(layers: list[Layer]) -> list[list[int]]:
    """The numbers of the layers, those together that share a delta."""
    home: dict[Any, int] = {}
    groups = {number: [number] for number in range(len(layers))}
    for number, layer in enumerate(layers):
        for module, _, adapter in layer.adapted():
            for name in adapter.names.values():
                first = home.setdefault((adapter.owner or module, name), number)
                if groups[first] is not groups[number]:
                    groups[first] += groups[number]
                    groups.update(dict.fromkeys(groups[number], groups[first]))
    unique = {id(group): sorted(group) for group in groups.values()}
    return sorted(unique.values())


def _weight(
    module: nn.Module, tensor: str, adapter: Adapter
) -> tuple[tuple[int, ...], torch.dtype]:  # fmt: skip
    if adapter.layout is None:
        raise AdaptationError(f"{tensor!r} has no shape yet: run a batch through the network first")
    return adapter.layout.matrix, present_tensor(module, tensor).dtype


def _default_size(method: Method) -> int:
    size = getattr(method, setting_of(method))
    if size is None:  # what it is for a matrix that can have any
        size = getattr(method.fit((2**16, 2**16)), setting_of(method))
    return size or 1


def _choose(choices: list[Choice], fixed: Cost, budget: Budget) -> None:
    """Settle all sizes, see `suggest`; the least ones fit."""

    def cost() -> Cost:
        return sum((choice.cost for choice in choices), fixed)

    largest = max(choice.proportion for choice in choices)

    def fits(level: int) -> bool:
        for choice in choices:
            choice.size = choice.sizes.at_most(level * choice.proportion // largest)
        return budget.allows(cost())

    top = max(choice.sizes.most * largest // choice.proportion + 1 for choice in choices)
    fits(_last(0, top, fits))
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

    # What did not fit once will not fit later, as there is only less left then.
    growing = sorted(choices, key=lambda choice: -choice.sizes.elements)
    while growing:
        growing = [choice for choice in growing if grows(choice)]


# --- the suggestion -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Suggestion:
    """Sizes for the layers of a network, and the strategy that gives them; prints as a table.

    Args:
        ranks: from the path of each layer, or adapted parameter, to its rank, or what other
            setting of its method decides the size.
        strategy: gives `enable_fine_tuning` these ranks; it holds for this network, by its paths.
        parameters: what is then trained, number of parameters.
        megabytes: size of the state that is then saved, in millions of bytes.
        rows: for each layer its path, weights, method with the setting, parameters.
    """

    ranks: dict[str, int]
    strategy: FineTuningStrategy
    parameters: int
    megabytes: float
    rows: list[tuple[str, str, str, int]] = field(repr=False, default_factory=list)

    def details(self, limit: int | None = None) -> str:
        """A table of the layers, or of the first `limit` of them."""
        rows = [(*rest, f"{count:,}") for *rest, count in self.rows[:limit]]
        more = len(self.rows) - len(rows)
        table = tabulate(
            rows, headers=["layer", "weight", "method", "parameters"], disable_numparse=True
        )
        return table + (f"\n... and {more} more (suggestion.details() lists all)" if more else "")

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} trained parameters, {self.megabytes:.3f} MB\n"
            f"{self.details(limit=50)}"
        )


def suggest(
    net: nn.Module, budget: int | float | str, strategy: FineTuningStrategy | None = None
) -> Suggestion:
    """The largest ranks, layer by layer, that a budget allows.

    The caps of the strategy decide which layers are adapted and by which method; what is chosen is
    the setting that decides how many parameters the method adds: a rank, a number of frequencies,
    the size of blocks. All that is trained counts, also new heads, biases, and methods without
    such a setting.

    All layers get the same rank, the largest that the budget allows. A layer that cannot have it
    gets its largest, which is also the last at which its delta has no more parameters than its
    weight. If the strategy gives some layers twice the rank of others, that proportion is kept.
    What is left of the budget then raises single layers by one step each, those with the largest
    weights first, ties in the order of the network; and again, until no layer can be raised within
    the budget. A layer with several weights has one rank for all of them, and so have layers that
    share a weight.

    The network is not touched, and its values are neither read nor copied: the caps act on a copy
    on the meta device, so that their checks and actions must not look at values.

    Args:
        net: the network.
        budget: trained parameters, ``100_000`` or ``"100k"`` or ``"1.5M"``; or a share of the
            parameters of the network, ``"1%"`` or ``0.01``; or megabytes of the state that is
            saved, ``"2MB"`` (a million bytes each, buffers such as running statistics included).
        strategy: whose caps adapt layers; None is LoRA on all of them.

    Returns:
        The ranks, and a strategy that gives exactly these.

    Raises:
        ValueError: if the budget is no budget, or too small: the error names the least that works.
            Also if the strategy has no cap that adapts by a method with a size, or if it fits the
            network with no size.
        TypeError: if the network is no module, or the strategy no strategy.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning, suggest
        >>> from gift.strategies import LoRAAllFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> suggestion = suggest(net, budget=1_000, strategy=LoRAAllFineTuningStrategy())
        >>> print(suggestion)
        936 trained parameters, 0.004 MB
        layer    weight    method        parameters
        -------  --------  ------------  ------------
        0        64 x 64   lora, rank 5  640
        2        10 x 64   lora, rank 4  296
        >>> enable_fine_tuning(net, suggestion.strategy).trainable_after
        936
    """
    if strategy is None:
        strategy = STRATEGIES["LoRAAllFineTuningStrategy"]()
    if not isinstance(strategy, FineTuningStrategy) or strategy.dry_run:
        raise TypeError(f"expected a FineTuningStrategy (an instance of it), got {strategy!r}")
    twin = on_meta(net)
    limit = Budget.of(budget, size_of(nn.Module.parameters(twin)))
    found: list[tuple[Layer, Method]] = []
    with rehearsed(twin, rewritten(strategy, lambda cap: _AdaptOpen(cap, found))):
        fixed, choices = cost_of(twin), _choices(found)
    if not choices:
        raise ValueError(f"{strategy!r} adapts nothing by a method that has a size to choose")
    least = sum((choice.sizes.cost(choice.sizes.least) for choice in choices), fixed)
    if not limit.allows(least):
        told = f"a budget of {budget} is too small: the least that works is {limit.told(least)}"
        whatever = f", of which {limit.told(fixed)} are needed whatever the ranks"
        raise ValueError(told + (whatever if any(fixed) else ""))
    _choose(choices, fixed, limit)
    by_path = {path: choice for choice in choices for path in choice.paths}
    sizes = {path: choice.size for path, choice in by_path.items()}
    decided = SizedStrategy(strategy, sizes)
    with rehearsed(twin, decided):
        cost = cost_of(twin)
    rows = [_row(path, choice) for path, choice in by_path.items()]
    return Suggestion(sizes, decided, cost.parameters, cost.bytes / 1e6, rows)


def _row(path: str, choice: Choice) -> tuple[str, str, str, int]:
    method = choice.sizes.method
    shapes = dict.fromkeys(" x ".join(map(str, shape)) for shape, _ in choice.sizes.weights)
    sized = f"{method.name}, {setting_of(method).replace('_', ' ')} {choice.size}"
    return path, ", ".join(shapes), sized, choice.cost.parameters if path == choice.paths[0] else 0
