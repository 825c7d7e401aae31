"""The modules and parameters that caps claimed, and their report as `Claim`s."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from gift.core.delta import deltas_of
from gift.core.dynamic_class import joined, plain_class
from gift.core.forwards import named_forward_deltas
from gift.core.iterator import named_parts
from gift.core.report import Claim
from gift.core.weights.record import WeightDelta, weight_deltas
from gift.errors import some
from gift.quantization import numel_of

Adapted = tuple[str, nn.Module, WeightDelta]
Placed = tuple[str, nn.Module, Any]  # a WeightDelta or a ForwardDelta


class Claimed(NamedTuple):
    """A module, or one parameter of it, that a cap claimed.

    Args:
        cap: number of the cap.
        path: dotted path of the module or parameter.
        class_name: class of the module that the cap saw.
        module: the module that stands there now, if any.
        replaced: whether that is another module than before.
        parameter: name of the parameter, or None for the whole module.
        gained: for a module that an open action changed, its new deltas and where they are. None if
            the module belongs to the cap.
    """

    cap: int
    path: str
    class_name: str
    module: nn.Module | None
    replaced: bool = False
    parameter: str | None = None
    gained: tuple[Placed, ...] | None = None

    def adapters(self) -> Iterator[Adapted]:
        """The adapted tensors in the claim: path, module that holds the tensor, its record."""
        if self.module is None:
            return
        if self.gained is not None:
            yield from (placed for placed in self.gained if isinstance(placed[2], WeightDelta))
            return
        if self.parameter is not None:
            if adapter := weight_deltas(self.module).get(self.parameter):
                yield self.path, self.module, adapter
            return
        for path, part in named_parts(self.module, self.path):
            for tensor, adapter in weight_deltas(part).items():
                yield joined(path, tensor), part, adapter

    def parameters(self) -> list[nn.Parameter | None]:
        """The parameters in the claim, including those that a method added.

        Parameters that an open cap added belong to that cap only.
        """
        if self.module is None:
            return []
        if self.gained is not None:
            return _parameters_of(self.gained)
        if self.parameter is not None:
            own = self.module._parameters.get(self.parameter)
            return [own, *_parameters_of(self.adapters())]
        parts = [part for _, part in named_parts(self.module)]
        extended = [part for part in parts if "_gift_forwards" in vars(part)]
        others = {id(p) for part in extended for p in _parameters_of(named_forward_deltas(part))}
        return [p for part in parts for p in part._parameters.values() if id(p) not in others]


def placed_deltas(module: nn.Module, prefix: str = "") -> Iterator[Placed]:
    """All deltas in `module`: the path of the tensor or wrapped module, that module, the delta."""
    for path, part in module.named_modules(prefix=prefix):
        for key, delta in deltas_of(part).items():
            yield (joined(path, key) if isinstance(delta, WeightDelta) else path), part, delta


def _parameters_of(placed: Iterable[Placed]) -> list[nn.Parameter | None]:
    return [
        module._parameters.get(name) for _, module, delta in placed for name in delta.names.values()
    ]


def claims_of(all_taken: Iterable[Claimed]) -> list[Claim]:
    """The claims, after ties are settled; a tied tensor counts where it was claimed first."""
    claims, counted = [], set[int]()
    texts: dict[int, str] = {}  # by id of the method, which many layers share
    for taken in all_taken:
        trained = {id(p): p for p in taken.parameters() if p is not None and p.requires_grad}
        trainable = sum(_size(p) for key, p in trained.items() if key not in counted)
        counted.update(trained)
        adapters = list(taken.adapters())
        texts |= {id(a.method): str(a.method) for *_, a in adapters if id(a.method) not in texts}
        larger = tuple(path for path, module, a in adapters if _is_larger(module, a))
        what = _what(taken, adapters, bool(trained), texts)
        claims.append(Claim(taken.cap, taken.path, taken.class_name, what, trainable, larger))
    return claims


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements, tied parameters once; a lazy parameter has none yet."""
    return sizes_of(parameters)[0]


def sizes_of(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Number of elements, tied parameters once, of all and of the trained parameters."""
    total = trained = 0
    for parameter in {id(p): p for p in parameters}.values():
        size = _size(parameter)
        total += size
        trained += size * parameter.requires_grad
    return total, trained


def _size(parameter: nn.Parameter) -> int:
    return 0 if is_lazy(parameter) else numel_of(parameter)


def _is_larger(module: nn.Module, adapter: WeightDelta) -> bool:
    if adapter.owner is not None or adapter.layout is None:
        return False
    delta = (module._parameters.get(name) for name in adapter.names.values())
    return sum(p.numel() for p in delta if p is not None) > math.prod(adapter.layout.shape)


def _what(taken: Claimed, adapters: list[Adapted], trained: bool, texts: Mapping[int, str]) -> str:
    if taken.module is None:
        return "removed"
    if taken.gained is not None:
        return _gained(taken.path, taken.gained)
    if taken.replaced:
        return f"replaced by {plain_class(type(taken.module)).__name__}"
    adapted: dict[str, list[str]] = {}
    for path, _, adapter in adapters:
        text = texts[id(adapter.method)] if adapter.owner is None else "the delta of a tied tensor"
        adapted.setdefault(text, []).append(path.removeprefix(f"{taken.path}."))
    if not adapted:
        return "trained" if trained else "frozen"
    if taken.parameter is not None:
        return "; ".join(adapted)
    return "; ".join(f"{text} on {some(tensors, limit=4)}" for text, tensors in adapted.items())


def _gained(path: str, placed: Iterable[Placed]) -> str:
    """What an open action did to a module; deltas without tensors are left out."""
    told = []
    for place, _, delta in placed:
        inside = place.removeprefix(path).strip(".")
        told += [f"{delta.method}" + f" on {inside}" * bool(inside)] * bool(delta.names)
    return "; ".join(told) or "left as it is"
