"""A strategy in which each adapted layer has its own size."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.iterator import Site
from gift.core.weights.attach import adapt_module, adapt_tensor
from gift.core.weights.record import WeightDelta, present_weight_deltas
from gift.errors import AdaptationError
from gift.factories import Action, ma_adapt, pa_adapt
from gift.factories.actions import method_and_options
from gift.factories.serializable import describe
from gift.layers.table import row_of
from gift.methods import Method
from gift.strategies.base import Cap, FineTuningStrategy, register_strategy

_ALPHAS = ("lora_alpha", "alpha")  # the settings that a scaling is made of, with a rank


class Layer(NamedTuple):
    """A layer, or one parameter, that is adapted with its own size.

    Args:
        path: its dotted path.
        module: the layer, or the module that holds the parameter.
        parameter: the name of the parameter; None for a layer.
    """

    path: str
    module: nn.Module
    parameter: str | None = None

    def adapted(self) -> Iterator[tuple[nn.Module, str, WeightDelta]]:
        """Yield the adapted tensors in it: module, name, delta."""
        for part in self.module.modules() if self.parameter is None else [self.module]:
            for tensor, delta in present_weight_deltas(part).items():
                if self.parameter in (None, tensor):
                    yield part, tensor, delta


def setting_of(method: Method) -> str:
    """Return the setting that determines the size of a method, which must have one."""
    assert method.size_setting is not None
    return method.size_setting


def with_size(method: Method, size: int, keep_scaling: bool = False) -> Method:
    """Return the method with that size, or the nearest size where a matrix cannot have it.

    Args:
        method: the method.
        size: its new size.
        keep_scaling: whether an alpha follows the size, so that the scaling stays.
    """
    changes: dict[str, Any] = {setting_of(method): size}
    if (clip := f"clip_{setting_of(method)}") in method.__dataclass_fields__:
        changes[clip] = True
    made: Any = replace(method, **changes)
    name = next((name for name in _ALPHAS if getattr(method, name, None) is not None), None)
    if not keep_scaling or name is None or not made.scaling:
        return made
    scaling: float = cast(Any, method).scaling
    return replace(made, **{name: getattr(method, name) * scaling / made.scaling})


def adapts_with_size(cap: Cap) -> bool:
    """Return whether a cap adapts by a method that has a size."""
    name, _ = getattr(cap.action, "recipe", ("", {}))
    known = isinstance(cap.action, Action) and name in (ma_adapt.__name__, pa_adapt.__name__)
    return known and AdaptEach(cap).method.size_setting is not None


class AdaptEach(Action):
    """An action that adapts as a cap's action does, but each layer with its own method.

    Args:
        cap: a cap for which `adapts_with_size` is True.
    """

    def __init__(self, cap: Cap) -> None:
        super().__init__(self._adapt)
        self.cap = cap
        name, arguments = cap.action.recipe  # type: ignore[union-attr]
        given = arguments | cap.params
        self.method, self.options, self.train_bias = method_and_options(**given)
        self.of_parameters = name == pa_adapt.__name__

    def method_at(self, layer: Layer) -> Method | None:
        """Return the method for that layer; None if it stays frozen.

        Raises:
            AdaptationError: if there is no method for it.
        """
        raise NotImplementedError

    def _adapt(self, *place: Any) -> None:
        site = Site(*place)
        path, module = site.path, site.module
        if self.of_parameters:
            layer = Layer(site.full_path, module, site.parameter_name)
            if (method := self.method_at(layer)) is None:
                site.parameter.requires_grad = False
            else:
                adapt_tensor(module, site.parameter_name, method, self.options)
            return
        for frozen in module.parameters():
            frozen.requires_grad = False
        problems = []
        for layer in list(_layers_in(module, path, set())) or [Layer(path, module)]:
            try:
                if (method := self.method_at(layer)) is not None:
                    adapt_module(layer.module, method, self.options, self.train_bias)
            except AdaptationError as error:
                problems.append(f"{layer.path or 'the network'}: {error}")
        if problems:
            raise AdaptationError("; ".join(problems))

    def __reduce__(self) -> Any:
        return type(self), (self.cap,)


def _layers_in(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[Layer]:
    """Yield the outermost layers with known weights in `module`."""
    if module in seen:
        return
    seen.add(module)
    row = row_of(plain_class(type(module)))
    if row is not None and row.names(module, row.weights):
        seen.update(module.modules())
        yield Layer(path, module)
        return
    for name, child in module.named_children():
        yield from _layers_in(child, joined(path, name), seen)


def rewritten(
    strategy: FineTuningStrategy, rewrite: Callable[[Cap], Any]
) -> FineTuningStrategy:  # fmt: skip
    """Replace the actions of all caps that adapt with a size.

    This includes caps in strategies that are used as actions.
    """

    def caps(given: list[Cap]) -> list[Cap]:
        made = []
        for cap in given:
            if isinstance(cap.action, FineTuningStrategy):
                cap = cap._replace(action=rewritten(cap.action, rewrite))
            elif adapts_with_size(cap):
                cap = Cap(cap.check, rewrite(cap), {})
            made.append(cap)
        return made

    types = strategy.constraint_type
    return FineTuningStrategy(caps(strategy.module_caps), caps(strategy.para_caps), types)


class _AdaptSized(AdaptEach):
    def __init__(self, cap: Cap, sizes: dict[str, int], keep_scaling: bool) -> None:
        super().__init__(cap)
        self.sizes, self.keep_scaling = sizes, keep_scaling

    def method_at(self, layer: Layer) -> Method | None:
        if layer.path not in self.sizes:
            raise AdaptationError("no size is given for it: were they chosen for another network?")
        size = self.sizes[layer.path]
        return with_size(self.method, size, self.keep_scaling) if size else None

    def __reduce__(self) -> Any:
        return type(self), (self.cap, self.sizes, self.keep_scaling)

    def __repr__(self) -> str:
        return f"{describe(self.cap.action)} of chosen sizes"


@register_strategy
class SizedStrategy(FineTuningStrategy):
    """A strategy in which each adapted layer has its own size.

    `gift.suggest` chooses sizes by a budget, `gift.starts.allocate` by data.

    Args:
        strategy: the strategy.
        sizes: maps the path of each layer or parameter that it adapts by a method with a size to
            the rank, or to another size setting of the method. A matrix that cannot have a rank
            gets its largest one; a layer with 0 stays frozen.
        keep_scaling: whether an alpha that the strategy gives follows the size, so that the scaling
            of each layer is that of the strategy; else alpha stays. Without a given alpha, the
            scaling depends on no rank.

    Raises:
        ValueError: on application, naming the layers for which no size is given.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import LoRAAllFineTuningStrategy, SizedStrategy
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> strategy = SizedStrategy(LoRAAllFineTuningStrategy(), {"0": 4, "2": 1})
        >>> report = enable_fine_tuning(net, strategy)
        >>> [tuple(p.shape) for p in net.parameters()]
        [(64, 4), (4, 64), (10, 1), (1, 64)]
    """

    def __init__(
        self, strategy: FineTuningStrategy, sizes: Mapping[str, int], keep_scaling: bool = False
    ) -> None:
        if not isinstance(strategy, FineTuningStrategy) or strategy.dry_run:
            raise TypeError(f"expected a strategy that can be applied, got {strategy!r}")
        own = dict(sizes)
        made = rewritten(strategy, lambda cap: _AdaptSized(cap, own, keep_scaling))
        super().__init__(made.module_caps, made.para_caps, made.constraint_type)

    def __repr__(self) -> str:
        strategy, sizes = self.init_paras["strategy"], self.init_paras["sizes"]
        return f"{type(self).__name__}({strategy!r}, {len(sizes)} sizes)"
