"""A strategy that names each tensor that it changes, as any strategy resolves to on a network."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from gift.core.dynamic_class import plain_class
from gift.core.forwards import ForwardMethod, forward_method_of, wrap_forward
from gift.core.frozen_norms import freeze_statistics
from gift.core.iterator import Site
from gift.core.weights.attach import adapt_biases, adapt_tensors
from gift.factories import Action, ma_freeze, ma_replace_head, mc_any, mc_path, pa_train
from gift.layers.layouts import LayoutOptions
from gift.layers.table import row_of
from gift.methods import Method, method_of
from gift.strategies.base import CapLike, FineTuningStrategy, register_strategy

PLACES = ("tensors", "biases", "modules")
"""What a group of deltas may change, each given by paths: see `ResolvedStrategy`."""


@register_strategy
class ResolvedStrategy(FineTuningStrategy):
    """A list of deltas by the paths of what they change, with their methods and settings.

    Files store strategies with lambdas in this form, since they cannot name a lambda.

    Args:
        deltas: groups as `gift.files.describe_deltas` returns them. For each method with its
            settings: ``{"method": name, "settings": {...}, "layout": {...}, "tensors": {path:
            shape}}``, with ``"biases"`` that are adapted with the weights of their layers. For a
            wrapped forward ``{"call": name, "settings": {...}, "modules": {path: None}}``.
        trained: names of the network's own parameters that are trained.
        statistics: paths of the norm layers whose running statistics are frozen.
        heads: maps paths of heads to their new numbers of classes.

    Raises:
        ValueError: naming every invalid description and every unknown method or setting.
    """

    def __init__(
        self,
        deltas: Iterable[Mapping[str, Any]] = (),
        trained: Iterable[str] = (),
        statistics: Iterable[str] = (),
        heads: Mapping[str, int] | None = None,
    ) -> None:
        work: dict[str, _Work] = {}
        problems: list[str] = []
        for group in deltas:
            try:
                _read(group, work)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                problems.append(f"{group!r}: {type(error).__name__}: {error}")
        if problems:
            raise ValueError("no deltas are described by:\n  " + "\n  ".join(problems))
        for path in statistics:
            work.setdefault(path, _Work()).still = True
        caps: list[CapLike] = [(_Listed(work), _Do(work))] if work else []
        caps += [(mc_path(path), ma_replace_head(n)) for path, n in (heads or {}).items()]
        names = _Names(trained)
        if not (caps or names.known):  # nothing is trained, on purpose
            caps = [(mc_any(), ma_freeze())]
        super().__init__(caps, [(names, pa_train())] if names.known else [])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.init_paras['deltas'])} kinds of deltas)"


class _Listed:
    """A check that matches modules by their paths."""

    def __init__(self, work: Mapping[str, "_Work"]) -> None:
        self.paths = frozenset(work)

    def __call__(self, *place: Any) -> bool:
        return Site(*place).path in self.paths

    def __repr__(self) -> str:
        return f"{len(self.paths)} modules"


class _Names:
    """A check that matches parameters by their paths."""

    def __init__(self, names: Iterable[str]) -> None:
        self.known = frozenset(names)

    def __call__(self, *place: Any) -> bool:
        return Site(*place).full_path in self.known

    def __repr__(self) -> str:
        return f"{len(self.known)} parameters"


class _Do(Action):
    """Applies to each module what is listed for it; later caps are still tried there."""

    def __init__(self, work: Mapping[str, "_Work"]) -> None:
        super().__init__(self._do, open=True)
        self.work = work

    def _do(self, *place: Any) -> None:
        site = Site(*place)
        self.work[site.path].do(site.module, site.path)

    def __reduce__(self) -> Any:
        return type(self), (self.work,)

    def __repr__(self) -> str:
        return "what is listed"


class _Work:
    """What is to be done to one module."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, Method, LayoutOptions]] = []
        self.calls: list[ForwardMethod] = []
        self.biases = False
        self.still = False

    def do(self, module: nn.Module, path: str) -> None:
        adapt_tensors((own[0], module, *own) for own in self.tensors)
        if self.biases:
            adapt_biases(module, row_of(plain_class(type(module))))
        for call in self.calls:
            wrap_forward(module, call, path)
        if self.still:
            freeze_statistics(module)


def group_of(method: Method, options: LayoutOptions) -> dict[str, Any]:
    """Return the start of a group of deltas: the method with its settings, and the layouts."""
    return {"method": method.name, "settings": method.settings, "layout": asdict(options)}


def _read(group: Mapping[str, Any], work: dict[str, _Work]) -> None:
    """Sort one group of `deltas` by modules."""
    settings = dict(group["settings"])
    if "call" in group:
        call = forward_method_of(group["call"], settings)
        for path in group["modules"]:
            work.setdefault(path, _Work()).calls.append(call)
        return
    method, options = method_of(group["method"], settings), LayoutOptions(**group["layout"])
    if f"clip_{method.size_setting}" not in settings:
        method = method.exact()  # each tensor has exactly the stated size
    for name in group.get("tensors", ()):
        path, _, tensor = name.rpartition(".")
        work.setdefault(path, _Work()).tensors.append((tensor, method, options))
    for name in group.get("biases", ()):
        work.setdefault(name.rpartition(".")[0], _Work()).biases = True
