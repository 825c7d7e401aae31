"""Suggest the largest rank of each layer that a budget allows."""

from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate
from torch import nn

from gift.budget.budget import Budget
from gift.budget.layers import AdaptOpen, Choice, choices_for, choose
from gift.engine.claims import size_of
from gift.engine.dry_run import Cost, cost_of, on_meta, rehearsed
from gift.methods import Method
from gift.strategies import STRATEGIES
from gift.strategies.base import FineTuningStrategy
from gift.strategies.sized import Layer, SizedStrategy, rewritten, setting_of
from gift.support.trees import table_html


@dataclass(frozen=True)
class Suggestion:
    """Sizes for the layers of a network, and the strategy that applies them; prints as a table.

    Args:
        ranks: maps the path of each layer or adapted parameter to its rank, or to another size
            setting of its method.
        strategy: strategy that makes `enable_fine_tuning` use these ranks. It refers to paths of
            this network.
        parameters: number of parameters that it trains.
        megabytes: size of the saved state, in millions of bytes.
        rows: path, weights, method with its setting, and number of parameters of each layer.
    """

    ranks: dict[str, int]
    strategy: FineTuningStrategy
    parameters: int
    megabytes: float
    rows: list[tuple[str, str, str, int]] = field(repr=False, default_factory=list)

    def details(self, limit: int | None = None) -> str:
        """Return a table of the layers, or of the first `limit` of them."""
        rows = [(*rest, f"{count:,}") for *rest, count in self.rows[:limit]]
        more = len(self.rows) - len(rows)
        table = tabulate(
            rows, headers=["layer", "weight", "method", "parameters"], disable_numparse=True
        )
        return table + (f"\n... and {more} more (suggestion.details() lists all)" if more else "")

    def _repr_html_(self) -> str:
        rows = [(*rest, f"{count:,}") for *rest, count in self.rows]
        head = f"{self.parameters:,} trained parameters, {self.megabytes:.3f} MB"
        return f"<div>{head}</div>{table_html(rows, ['layer', 'weight', 'method', 'parameters'])}"

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} trained parameters, {self.megabytes:.3f} MB\n"
            f"{self.details(limit=50)}"
        )


def suggest(
    net: nn.Module, budget: int | float | str, strategy: FineTuningStrategy | None = None
) -> Suggestion:
    """Return the largest rank of each layer that a budget allows.

    The caps of the strategy decide which layers are adapted, and by which method. This function
    chooses the setting that determines how many parameters the method adds: a rank, a number of
    frequencies, a block size. Everything that is trained counts, including new heads, biases, and
    methods without such a setting.

    All layers get the same rank, the largest that the budget allows. A layer that cannot have it
    gets its own largest rank, which is bounded by the last one at which its delta has no more
    parameters than its weight. If the strategy gives some layers twice the rank of others, that
    proportion is kept. The rest of the budget then raises single layers by one step each, those
    with the largest weights first, and ties in the order of the network. This repeats until no
    layer can be raised within the budget. A layer with several weights has one rank for all of
    them, and layers that share a weight have one rank too.

    The network is not changed, and its values are neither read nor copied. The caps act on a copy
    on the meta device, so their checks and actions must not read values.

    Args:
        net: the network.
        budget: trained parameters, ``100_000`` or ``"100k"`` or ``"1.5M"``; or a share of the
            parameters of the network, ``"1%"`` or ``0.01``; or megabytes of the state that is
            saved, ``"2MB"`` (a million bytes each, buffers such as running statistics included).
        strategy: the strategy whose caps adapt layers; None means LoRA on all layers.

    Returns:
        The ranks, and a strategy that gives exactly these.

    Raises:
        ValueError: if the budget is invalid, or too small, in which case the error names the
            smallest one that works. Also if the strategy has no cap that adapts by a method with a
            size, or if no size fits the network.
        TypeError: if the network is not a module, or the strategy not a strategy.

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
    twin = twin_of(net, strategy)
    limit = Budget.of(budget, size_of(nn.Module.parameters(twin)))
    fixed, choices = open_choices(twin, strategy)
    least = sum((choice.sizes.cost(choice.sizes.least) for choice in choices), fixed)
    if not limit.allows(least):
        text = f"a budget of {budget} is too small: the least that works is {limit.in_words(least)}"
        whatever = f", of which {limit.in_words(fixed)} are needed whatever the ranks"
        raise ValueError(text + (whatever if any(fixed) else ""))
    choose(choices, fixed, limit)
    return suggestion_of(twin, strategy, choices)


def twin_of(net: nn.Module, strategy: Any) -> nn.Module:
    """Return a copy of the network on the meta device, for a strategy that can be applied.

    Raises:
        TypeError: if the network is not a module, or the strategy not a strategy.
    """
    if not isinstance(strategy, FineTuningStrategy) or strategy.dry_run:
        raise TypeError(f"expected a FineTuningStrategy (an instance of it), got {strategy!r}")
    return on_meta(net)


def open_choices(twin: nn.Module, strategy: FineTuningStrategy) -> tuple[Cost, list[Choice]]:
    """Return the cost whatever the sizes, and the layers whose sizes can be chosen.

    Raises:
        ValueError: if no layer has a size to choose.
    """
    found: list[tuple[Layer, Method]] = []
    with rehearsed(twin, rewritten(strategy, lambda cap: AdaptOpen(cap, found))):
        fixed, choices = cost_of(twin), choices_for(found)
    if not choices:
        raise ValueError(f"{strategy!r} adapts nothing by a method that has a size to choose")
    return fixed, choices


def suggestion_of(
    twin: nn.Module, strategy: FineTuningStrategy, choices: list[Choice], **options: Any
) -> Suggestion:
    """Return what the sizes of the choices make of a strategy.

    Args:
        twin: the network on the meta device.
        strategy: the strategy.
        choices: the layers with their sizes.
        options: further arguments of `SizedStrategy`.
    """
    by_path = {path: choice for choice in choices for path in choice.paths}
    sizes = {path: choice.size for path, choice in by_path.items()}
    decided = SizedStrategy(strategy, sizes, **options)
    with rehearsed(twin, decided):
        cost = cost_of(twin)
    rows = [_row(path, choice) for path, choice in by_path.items()]
    return Suggestion(sizes, decided, cost.parameters, cost.bytes / 1e6, rows)


def _row(path: str, choice: Choice) -> tuple[str, str, str, int]:
    method = choice.sizes.method
    shapes = dict.fromkeys(" x ".join(map(str, shape)) for shape, _ in choice.sizes.weights)
    if not choice.size:
        return path, ", ".join(shapes), "frozen", 0
    sized = f"{method.name}, {setting_of(method).replace('_', ' ')} {choice.size}"
    return path, ", ".join(shapes), sized, choice.cost.parameters if path == choice.paths[0] else 0
