"""Strategies made of other strategies."""

from collections.abc import Iterable
from typing import Any

from gift.core.iterator import Site
from gift.factories.serializable import bind, describe
from gift.strategies.base import Cap, CapLike, FineTuningStrategy, register_strategy


@register_strategy
class MergedStrategy(FineTuningStrategy):
    """The caps of several strategies in order, then additional ones; see `merge_strategies`."""

    def __init__(
        self,
        strategies: Iterable[FineTuningStrategy],
        module_caps: Iterable[CapLike] = (),
        para_caps: Iterable[CapLike] = (),
    ) -> None:
        parts = list(strategies)
        wrong = [part for part in parts if not isinstance(part, FineTuningStrategy)]
        if wrong or not parts:
            raise TypeError(f"expected strategies to merge, got {wrong or 'none'}")
        if any(part.dry_run for part in parts):
            raise TypeError("a DebugStrategy only prints: wrap the merged strategy in it")
        super().__init__(
            [cap for part in parts for cap in part.module_caps] + list(module_caps),
            [cap for part in parts for cap in part.para_caps] + list(para_caps),
            _common_types(parts),
        )


def merge_strategies(
    strategies: Iterable[FineTuningStrategy],
    module_caps: Iterable[CapLike] = (),
    para_caps: Iterable[CapLike] = (),
) -> MergedStrategy:
    """Merge strategies into one with all of their caps in order, then additional ones.

    Args:
        strategies: the strategies, at least one.
        module_caps: additional caps for modules.
        para_caps: additional caps for parameters.

    Raises:
        ValueError: if no network could be an instance of a type that each strategy accepts.
    """
    return MergedStrategy(list(strategies), list(module_caps), list(para_caps))


def _common_types(strategies: list[FineTuningStrategy]) -> tuple[type, ...]:
    common: tuple[type, ...] = ()
    for strategy in strategies:
        mine = strategy.constraint_type
        if not common or not mine:
            common = common or mine
            continue
        narrower = [a if issubclass(a, b) else b for a in common for b in mine
                    if issubclass(a, b) or issubclass(b, a)]  # fmt: skip
        if not narrower:
            names = [[t.__name__ for t in types] for types in (common, mine)]
            raise ValueError(
                f"the strategies accept no common network: some require {names[0]}, "
                f"{type(strategy).__name__} requires {names[1]}"
            )
        common = tuple(dict.fromkeys(narrower))
    return common


@register_strategy
class DebugStrategy(FineTuningStrategy):
    """Print what each check of a strategy matches, and which cap would claim it; change nothing.

    Args:
        strategy: the strategy to look at.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import DebugStrategy, LoRAAllFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> report = enable_fine_tuning(net, DebugStrategy(LoRAAllFineTuningStrategy()))
        module cap 0 claims 0 (Linear): mc_layer() -> ma_adapt(...)
        >>> type(net[0]) is nn.Linear
        True
    """

    dry_run = True

    def __init__(self, strategy: FineTuningStrategy) -> None:
        if not isinstance(strategy, FineTuningStrategy):
            raise TypeError(f"expected a strategy, got {strategy!r}")
        super().__init__(
            _printing("module", strategy.module_caps),
            _printing("parameter", strategy.para_caps),
            strategy.constraint_type,
        )


def _printing(kind: str, caps: list[Cap]) -> list[CapLike]:
    return [(_PrintingCheck(kind, caps, n), _Nothing(cap)) for n, cap in enumerate(caps)]


class _Nothing:
    """An action that does nothing, with the text of the action that it replaces."""

    def __init__(self, cap: Cap) -> None:
        self.cap = cap
        self.open = getattr(cap.action, "open", False)

    def __call__(self, *place: Any) -> None:
        pass

    def __repr__(self) -> str:
        return repr(self.cap).partition(" -> ")[2]


class _PrintingCheck:
    """The check of one cap, which prints its matches and the later caps that would also match."""

    def __init__(self, kind: str, caps: list[Cap], number: int) -> None:
        self.kind = kind
        self.caps = caps
        self.number = number

    def bind(self, network: Any) -> "_PrintingCheck":
        bound = [cap._replace(check=bind(cap.check, network)) for cap in self.caps]
        return _PrintingCheck(self.kind, bound, self.number)

    def __call__(self, *place: Any) -> bool:
        if not self.caps[self.number].check(*place):
            return False
        site = Site(*place)
        where = f"{site.in_words()} ({site.class_name})"
        own = self.caps[self.number]
        if getattr(own.action, "open", False):  # later caps are tried too, and print for themselves
            print(f"{self.kind} cap {self.number} wraps {where}: {own}")
            return True
        verb = "claims"
        for number, cap in list(enumerate(self.caps))[self.number :]:
            if number == self.number or cap.check(*place):
                print(f"{self.kind} cap {number} {verb} {where}: {cap}")
                verb = "would also match"
        return True

    def __repr__(self) -> str:
        return describe(self.caps[self.number].check)
