"""The modules and parameters that caps claimed, and their report as `Claim`s."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from gift.core.delta import present_deltas
from gift.core.dynamic_class import joined, plain_class
from gift.core.forwards import named_forward_deltas
from gift.core.iterator import named_parts
from gift.core.report import Claim
from gift.core.weights.record import WeightDelta, present_weight_deltas
from gift.errors import some
from gift.quantization import shape_of

Adapted = tuple[str, nn.Module, WeightDelta]


class PlacedDelta(NamedTuple):
    """A delta in a network.

    Args:
        path: dotted path of the adapted tensor or of the wrapped module.
        module: the module that holds the delta.
        delta: a `WeightDelta` or a `ForwardDelta`.
    """

    path: str
    module: nn.Module
    delta: Any


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
    gained: tuple[PlacedDelta, ...] | None = None

    def deltas(self) -> Iterator[Adapted]:
        """The adapted tensors in the claim: path, module that holds the tensor, its record."""
        if self.module is None:
            return
        if self.gained is not None:
            yield from (placed for placed in self.gained if isinstance(placed.delta, WeightDelta))
            return
        if self.parameter is not None:
            if delta := present_weight_deltas(self.module).get(self.parameter):
                yield self.path, self.module, delta
            return
        for path, part in named_parts(self.module, self.path):
            for tensor, delta in present_weight_deltas(part).items():
                yield joined(path, tensor), part, delta

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
            return [own, *_parameters_of(self.deltas())]
        parts = [part for _, part in named_parts(self.module)]
        wrapped = [part for part in parts if "_gift_forwards" in vars(part)]
        others = {id(p) for part in wrapped for p in _parameters_of(named_forward_deltas(part))}
        return [p for part in parts for p in part._parameters.values() if id(p) not in others]


def placed_deltas(module: nn.Module, prefix: str = "") -> Iterator[PlacedDelta]:
    """All deltas in `module`: the path of the tensor or wrapped module, that module, the delta."""
    for path, part in module.named_modules(prefix=prefix):
        for key, delta in present_deltas(part).items():
            own = joined(path, key) if isinstance(delta, WeightDelta) else path
            yield PlacedDelta(own, part, delta)


def _parameters_of(placed: Iterable[tuple[str, nn.Module, Any]]) -> list[nn.Parameter | None]:
    return [
        module._parameters.get(name) for _, module, delta in placed for name in delta.names.values()
    ]


def claims_of(all_claimed: Iterable[Claimed], adapted: Iterable[list[Adapted]]) -> list[Claim]:
    """The claims, after ties are settled; a tied tensor counts where it was claimed first.

    Args:
        all_claimed: what caps claimed.
        adapted: the adapted tensors of each claim.
    """
    claims, counted = [], set[int]()
    texts: dict[int, str] = {}  # by id of the method, which many layers share
    for claimed, deltas in zip(all_claimed, adapted, strict=True):
        trained = {id(p): p for p in claimed.parameters() if p is not None and p.requires_grad}
        trainable = sum(_size(p) for key, p in trained.items() if key not in counted)
        counted.update(trained)
        texts |= {id(a.method): str(a.method) for *_, a in deltas if id(a.method) not in texts}
        larger = tuple(path for path, module, a in deltas if _is_larger(module, a))
        what = _what(claimed, deltas, bool(trained), texts)
        claims.append(Claim(claimed.cap, claimed.path, claimed.class_name, what, trainable, larger))
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
    return 0 if is_lazy(parameter) else shape_of(parameter).numel()


def _is_larger(module: nn.Module, delta: WeightDelta) -> bool:
    if delta.owner is not None or delta.layout is None:
        return False
    added = (module._parameters.get(name) for name in delta.names.values())
    return sum(p.numel() for p in added if p is not None) > math.prod(delta.layout.shape)


def _what(claimed: Claimed, deltas: list[Adapted], trained: bool, texts: Mapping[int, str]) -> str:
    if claimed.module is None:
        return "removed"
    if claimed.gained is not None:
        return _gained(claimed.path, claimed.gained)
    if claimed.replaced:
        return f"replaced by {plain_class(type(claimed.module)).__name__}"
    adapted: dict[str, list[str]] = {}
    for path, _, delta in deltas:
        text = texts[id(delta.method)] if delta.owner is None else "the delta of a tied tensor"
        adapted.setdefault(text, []).append(path.removeprefix(f"{claimed.path}."))
    if not adapted:
        return "trained" if trained else "frozen"
    if claimed.parameter is not None:
        return "; ".join(adapted)
    return "; ".join(f"{text} on {some(tensors, limit=4)}" for text, tensors in adapted.items())


def _gained(path: str, placed: Iterable[PlacedDelta]) -> str:
    """What an open action did to a module; deltas without tensors are left out."""
    texts = []
    for own, _, delta in placed:
        inside = own.removeprefix(path).strip(".")
        texts += [f"{delta.method}" + f" on {inside}" * bool(inside)] * bool(delta.names)
    return "; ".join(texts) or "left as it is"
