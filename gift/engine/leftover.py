"""What a strategy for all layers leaves out: raw weights in modules of unknown classes."""

import re
from typing import Any

from torch import nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.raw_parameters import raw_weights
from gift.errors import some
from gift.layers.table import LAYERS, row_of
from gift.quantization import shape_of
from gift.strategies.base import Cap, FineTuningStrategy

SHARE = 0.1
"""Share of the base from which on raw weights that are left out are reported."""


def describe_leftover(
    network: nn.Module, strategy: FineTuningStrategy, kept: set[int], known: set[int], total: int
) -> str:
    """Describe the raw weights that a strategy for all layers leaves out; empty if they are few.

    Args:
        network: the network, after the strategy.
        strategy: the strategy.
        kept: ids of the parameters that caps claimed.
        known: ids of the parameters of the base.
        total: number of elements of the base.
    """
    cap = next(filter(_is_for_all, strategy.module_caps), None)
    if cap is None:
        return ""
    found: dict[int, tuple[str, nn.Module, int]] = {}
    for path, module in network.named_modules():
        if kept.issuperset(map(id, module._parameters.values())):
            continue
        for name, parameter in raw_weights(module):
            if id(parameter) in known and id(parameter) not in kept:
                size = shape_of(parameter).numel()
                found.setdefault(id(parameter), (joined(path, name), module, size))
    share = sum(size for *_, size in found.values()) / max(total, 1)
    if share < SHARE:
        return ""
    paths = [path for path, *_ in found.values()]
    text = f"{share:.0%} of the base is in raw parameters that no cap matches: {some(paths)}"
    return "; ".join([text, *strangers(network), f"{cap_for(paths, cap)} as a parameter cap does"])


def cap_for(paths: list[str], cap: Cap) -> str:
    """Code of a parameter cap for these paths that adapts as a module cap does, ready to copy."""
    globs = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths))
    params = f", {cap.params}" if cap.params else ""
    return f"(pc_path(glob={globs}), {repr(cap.action).replace('ma_adapt', 'pa_adapt', 1)}{params})"


def strangers(network: nn.Module) -> list[str]:
    """Describe classes in the network that have the name of a torch layer but are not that layer.

    Only classes with raw weights are listed.
    """
    names = {row.kind.__name__ for row in LAYERS if isinstance(row.kind, type)}
    names |= {n for n, c in vars(nn).items() if isinstance(c, type) and row_of(c) is not None}
    classes = {plain_class(type(module)): module for module in network.modules()}
    return [
        f"its own class {cls.__module__}.{cls.__qualname__} is not torch's nn.{cls.__name__}"
        for cls, module in classes.items()
        if cls.__name__ in names and row_of(cls) is None and dict(raw_weights(module))
    ]


def hints_for_strangers(network: nn.Module, strategy: FineTuningStrategy) -> list[str]:
    """`strangers` for a strategy that adapts layers and found none, with a cap that matches."""
    cap = next((cap for cap in strategy.module_caps if _recipe(cap.action) == "ma_adapt"), None)
    hints = strangers(network)
    if cap is None or not hints:
        return hints
    paths = [joined(p, n) for p, module in network.named_modules() for n, _ in raw_weights(module)]
    return [*hints, f"the parameter cap {cap_for(paths, cap)} takes its weights"]


def _is_for_all(cap: Cap) -> bool:
    """Whether a cap adapts all layers that gift knows, with an action that a file can name."""
    recipe: Any = getattr(cap.check, "recipe", ("", {}))
    return recipe[0] == "mc_layer" and not recipe[1].get("*") and _recipe(cap.action) == "ma_adapt"


def _recipe(part: Any) -> str:
    """The name of the factory that made a check or an action; empty if there is none."""
    return getattr(part, "recipe", ("", {}))[0]
