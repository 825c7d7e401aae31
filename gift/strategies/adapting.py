"""For each method, strategies that adapt all layers, linear layers, or convolutions."""

import inspect
from collections.abc import Callable
from typing import Any

from gift.factories import Check, ma_adapt, ma_freeze, mc_layer, mc_type, pa_adapt, pc_experts
from gift.methods import METHODS, Method
from gift.methods.base import WHEN_REGISTERED
from gift.private.torch.layers import NORM_WITH_STATISTICS
from gift.strategies.base import CapLike, FineTuningStrategy, register_strategy

# The options of a strategy besides the settings of its method.
_OPTIONS: dict[str, Any] = {
    "train_bias": False,
    "conv_layout": None,
    "split_qkv": False,
    "freeze_statistics": False,
}

# Further options of a strategy for all layers.
_FOR_ALL: dict[str, Any] = {"experts": True}

_DOC = """{title} on {layers}; see `gift.methods.{method}`, whose settings these are.

The network's output stays bit for bit what it was until the first training step. All other
parameters are frozen.

Args:
    train_bias: also train the biases of the adapted layers.
    conv_layout: a convolution's weight ``(o, i, kh, kw)`` is seen as the matrix ``(o*kh, i*kw)``
        (``"balanced"``) or ``(o, i*kh*kw)`` (``"out_as_h"``); here {conv_layouts}, None is the
        first.
    split_qkv: read query, key and value of ``nn.MultiheadAttention`` as three matrices.
    freeze_statistics: keep norm layers in evaluation mode, so that running statistics stand still.
{experts}
Raises:
    ValueError: for settings out of range.
"""

_KINDS: dict[str, tuple[Check, str]] = {
    "All": (mc_layer(), "every layer whose weights gift knows"),
    "Linear": (mc_layer("linear"), "linear layers, their subclasses, transformers' ``Conv1D``"),
    "Conv": (mc_layer("conv"), "convolutions, transposed ones included"),
}


class _AdaptingStrategy(FineTuningStrategy):
    """Base class of the strategies made here."""

    method: type[Method]
    layers: Check

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = inspect.signature(type(self)).bind(*args, **kwargs).arguments
        freeze_statistics = settings.pop("freeze_statistics", False)
        experts = settings.pop("experts", "experts" in inspect.signature(type(self)).parameters)
        caps: list[CapLike] = [(self.layers, ma_adapt(self.method.name, **settings))]
        if freeze_statistics:
            caps.append((mc_type(NORM_WITH_STATISTICS), ma_freeze(statistics=True)))
        super().__init__(
            caps, [(pc_experts(), pa_adapt(self.method.name, **settings))] if experts else []
        )

    @classmethod
    def of_file(cls, init_paras: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that a file stands for.

        A file that lists all arguments but `experts` was written before `experts` existed, and left
        experts out.
        """
        known = set(inspect.signature(cls).parameters)
        written = "experts" in known and known - {"experts"} <= init_paras.keys()
        return init_paras | {"experts": init_paras.get("experts", False)} if written else init_paras


_EXPERTS = """\
    experts: also adapt the weights of a mixture's experts, which a module holds as one parameter
        of three axes; see `pc_experts`.
"""


def _signature(method: type[Method], more: dict[str, Any]) -> inspect.Signature:
    """Return the signature: the settings of the method, then the options of all strategies."""
    settings = list(inspect.signature(method).parameters.values())
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (_OPTIONS | more).items()
    ]
    return inspect.Signature([*settings, *options])


def strategies_of(method: type[Method]) -> dict[str, type[FineTuningStrategy]]:
    """Make the strategies of a method, by name: ``<prefix>AllFineTuningStrategy`` and so on.

    Args:
        method: a registered method.

    Example:
        >>> from gift.methods import METHODS
        >>> sorted(strategies_of(METHODS["lora"]))
        ['LoRAAllFineTuningStrategy', 'LoRAConvFineTuningStrategy', 'LoRALinearFineTuningStrategy']
    """
    made = {}
    for kind, (layers, described) in _KINDS.items():
        name = f"{method.strategy_prefix}{kind}FineTuningStrategy"
        doc = _DOC.format(
            title=method.strategy_prefix,
            layers=described,
            method=method.__name__,
            experts=_EXPERTS if kind == "All" else "",
            conv_layouts=" or ".join(f'``"{layout}"``' for layout in method.conv_layouts),
        )
        namespace = {
            "__doc__": doc,
            "__module__": "gift.strategies.of_methods",
            "__signature__": _signature(method, _FOR_ALL if kind == "All" else {}),
            "method": method,
            "layers": layers,
        }
        made[name] = register_strategy(type(name, (_AdaptingStrategy,), namespace))
    return made


# Typed as Any, since a type checker cannot know the settings of each.
STRATEGIES: dict[str, Any] = {}
"""The strategies of all registered methods, by name."""


def lookup_for(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose attributes are `STRATEGIES`.

    It finds the strategies of methods that are registered later, too.
    """

    def lookup(name: str) -> Any:
        if name not in STRATEGIES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return STRATEGIES[name]

    return lookup


def _add(method: type[Method]) -> None:
    STRATEGIES.update(strategies_of(method))


for _method in METHODS.values():
    _add(_method)
WHEN_REGISTERED.append(_add)
