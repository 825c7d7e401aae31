"""Different deltas for different rows of a batch."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.bank.changes import Change, Changes, changes_of, moved_values
from gift.bank.places import SAME, Lost, One, Place, Rows, everywhere
from gift.bank.tracking import WAY_OUT, Hook, Tracking
from gift.core.dynamic_class import plain_class
from gift.errors import AdaptationError, GiftWarning, refuse
from gift.layers.layouts import Layout
from gift.layers.table import known_features, operation_of, reader_of
from gift.private.torch.layers import convolve
from gift.private.torch.tracing import uncompiled, unfollowed

Factors = tuple[Tensor, Tensor]


@contextmanager
def rows_added(
    net: nn.Module, deltas: Mapping[str, Any], rows: list[str | None], dim: int
) -> Iterator[None]:
    """Context manager in which the base `net` adds to each row of a batch the row's own delta."""
    read = {name: changes_of(net, delta, dense=False) for name, delta in deltas.items()}
    if not rows:
        raise ValueError("there are no rows")
    layers = _layers(net, read)
    weights = {path: module._parameters.get("weight") for path, (module, _) in layers.items()}
    held = {path: weight for path, weight in weights.items() if weight is not None}
    tracking = Tracking(net, held, len(rows), dim, differs=len({*rows}) > 1)
    seen: set[str] = set()
    with uncompiled(), tracking, ExitStack() as hooks:
        for path, (module, by_name) in layers.items():
            side = _SIDES[operation_of(type(module))]
            own = Hook(_Rows(path, side, by_name, rows, tracking, seen))
            # Prepended, so that other hooks see the complete output.
            hook = module.register_forward_hook(own, prepend=True, with_kwargs=True)
            hooks.callback(hook.remove)
        try:
            yield
        except Exception as error:
            if tracking.repeated:
                error.add_note(
                    f"{sorted(tracking.repeated)} got one input for all rows, and gave an output "
                    "for each. If the network does not expect that, leave these layers out of the "
                    "deltas, or call it once for each delta"
                )
            raise
    ids = {path: id(module._parameters.get("weight")) for path, (module, _) in layers.items()}
    reached = {ids[path] for path in seen}  # one of several tied layers is enough
    never = [path for path in layers if path not in seen and ids[path] not in reached]
    if tracking.was_called and never:
        warnings.warn(
            f"{never} were never called, so their deltas had no effect", GiftWarning, stacklevel=4
        )


def _layers(
    net: nn.Module, read: Mapping[str, Changes]
) -> dict[str, tuple[nn.Module, dict[str, Factors]]]:
    """Return the changed layers, and for each delta the factors of the weight as it is stored."""
    layers: dict[str, tuple[nn.Module, dict[str, Factors]]] = {}
    problems = []
    parents = {id(c): (parent, n) for parent in net.modules() for n, c in parent.named_children()}
    for name, changes in read.items():
        problems += [f"{name}: {what}" for what in changes.foreign]
        problems += [f"{name}: {path} has a value of its own" for path in moved_values(changes)]
        for path, change in _all_changes(changes).items():
            why = _unfit(change, parents.get(id(change.module)))
            if why:
                problems.append(f"{name}: {path} {why}")
                continue
            _, by_name = layers.setdefault(path, (change.module, {}))
            by_name[name] = _of_weight(change.layout, *change.factors)  # type: ignore[misc]  # not None: see `_unfit`
    refuse(AdaptationError, "rows cannot differ in", problems)
    return layers


def _all_changes(changes: Changes) -> dict[str, Change]:
    """Return all changes, with tied tensors as changes by the delta that they read."""
    found = dict(changes.weights)
    for path, (module, tensor, delta) in changes.tied.items():
        owner = next(c for c in found.values() if c.module is delta.owner)
        found[path] = replace(owner, module=module, tensor=tensor)
    return found


def _unfit(change: Change, parent: tuple[nn.Module, str] | None) -> str:
    """Return why a change cannot differ between rows; empty if it can."""
    layer: Any = change.module
    cls = plain_class(type(layer))
    if change.factors is None:
        return "is changed by a method whose delta is not of low rank"
    known = operation_of(cls) in _SIDES
    if change.tensor != "weight" or not known:
        bases = [base for base in cls.__mro__ if issubclass(base, nn.Module)]
        is_own = not known and any(operation_of(base) in _SIDES for base in bases)
        own = ", whose forward is its own" if is_own else ""
        return (
            f"belongs to a {cls.__module__}.{cls.__qualname__}{own}, expected a linear layer, "
            "convolution or embedding"
        )
    if operation_of(cls) == "embedding" and layer.max_norm is not None:
        return "belongs to an embedding with max_norm"
    if parent is not None and (reader := reader_of(*parent)):
        return f"belongs to a layer that is never called, as {reader.__name__} reads the weight"
    return ""


class _Rows:
    """Forward hook of one layer of the base: adds each row's delta to the output."""

    def __init__(
        self,
        path: str,
        side: Callable[[Any, Tensor, Factors], Tensor],
        by_name: dict[str, Factors],
        rows: list[str | None],
        tracking: Tracking,
        seen: set[str],
    ) -> None:
        self.path, self.side = path, side
        self.by_name = by_name
        self.rows = [name if name in by_name else None for name in rows]
        self.tracking = tracking
        self.seen = seen
        self.names = {name: i for i, name in enumerate(by_name)}
        self.known: dict[tuple[int, int, torch.device], dict[str, Tensor]] = {}

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        self.seen.add(self.path)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        with unfollowed():  # these operations need no tracking
            if not self.tracking.differs:
                return self._added(module, x, output, self.rows[0])
            changed, place = self._changed(module, x, output)
        self.tracking.set_place(changed, place)
        return changed

    def _added(self, module: Any, x: Tensor, output: Tensor, name: str | None) -> Tensor:
        """Return the output with one delta for all of it."""
        if name is None:
            return output
        change = self.side(module, x, self.by_name[name])
        return (output + change).to(output.dtype)

    def _changed(self, module: Any, x: Tensor, output: Tensor) -> tuple[Tensor, Place]:
        """Return the output with each row's delta, and where its rows are."""
        tracking, side = self.tracking, self.side
        dim = tracking.dim
        place = tracking.in_layer(x)
        if len({*self.rows}) == 1 or isinstance(place, One):
            name = self.rows[place.row if isinstance(place, One) else 0]
            return self._added(module, x, output, name), tracking.place_of(output)
        if place is SAME and x.ndim > dim and x.shape[dim] == 1:
            # An input computed once for all rows, like positions, is expanded to all of them.
            tracking.repeated.add(self.path)
            x, output = (_repeated(tensor, tracking.batch, dim) for tensor in (x, output))
            place = Rows(len(self.rows), dim, tracking.batch // len(self.rows))
        if not isinstance(place, Rows) or place.axis not in _axes_before_features(module, x):
            raise ValueError(
                f"{self.path} gets {tuple(x.shape)}, which is not the batch of {len(self.rows)} "
                f"rows: {_why(place)}. {WAY_OUT}"
            )
        axis = place.axis
        for name, index in self._indices(place, x.shape[axis], x.device).items():
            taken = output.index_select(axis, index)
            change = side(module, x.index_select(axis, index), self.by_name[name])
            output = output.index_copy(axis, index, (taken + change).to(output.dtype))
        return output, place

    def _indices(self, place: Rows, size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the indices of each delta along the axis of the rows."""
        key = (size, place.inner, device)
        if place.ids is not None or key not in self.known:
            rows = torch.tensor([self.names.get(name or "", -1) for name in self.rows])
            each = rows[everywhere(place, size)].to(device)
            found = {
                name: (each == i).nonzero().flatten()
                for name, i in self.names.items()
                if name in self.rows
            }
            if place.ids is not None:
                return found
            self.known[key] = found
        return self.known[key]


def _why(place: Place) -> str:
    if isinstance(place, Lost):
        return place.why
    if isinstance(place, Rows):
        return f"the rows are along axis {place.axis}"
    return "it is the same for all rows and has no axis of the batch; `x[None]` would have one"


def _repeated(tensor: Tensor, times: int, dim: int) -> Tensor:
    sizes = [-1] * tensor.ndim
    sizes[dim] = times
    return tensor.expand(sizes)


def _axes_before_features(layer: Any, x: Tensor) -> range:
    """Return the axes of a layer's input that can be the batch."""
    features = known_features(layer)
    assert features is not None  # of all layers in `_SIDES`
    return range(x.ndim if features.inputs is None else x.ndim + features.axis)


def _of_weight(layout: Layout, left: Tensor, right: Tensor) -> Factors:
    """Return the factors as the layer stores the weight; for a convolution, the whole change."""
    if len(layout.shape) != 2:
        return layout.to_weight(left @ right), right
    return (right.mT, left.mT) if layout.order == (1, 0) else (left, right)


def _linear(layer: Any, x: Tensor, factors: Factors) -> Tensor:
    left, right = factors
    return F.linear(F.linear(x.to(right.dtype), right), left)


def _transposed_linear(layer: Any, x: Tensor, factors: Factors) -> Tensor:
    left, right = factors
    return (x.to(left.dtype) @ left) @ right


def _conv(layer: Any, x: Tensor, factors: Factors) -> Tensor:
    return convolve(layer, x.to(factors[0].dtype), factors[0], None)


def _embedding(layer: Any, ids: Tensor, factors: Factors) -> Tensor:
    left, right = factors
    return F.embedding(ids, left) @ right


_SIDES: dict[str, Callable[[Any, Tensor, Factors], Tensor]] = {
    "linear": _linear,
    "packed linear": _linear,
    "transposed linear": _transposed_linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "embedding": _embedding,
}
