"""Merge deltas into the weights temporarily."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.dynamic_class import set_class, subclass_with
from gift.core.frozen_norms import release_statistics
from gift.core.merging.possible import NOT_MERGED, check, without_values
from gift.core.merging.weights import effective
from gift.core.network import remove_record
from gift.core.undo.snapshot import Snapshot
from gift.core.undo.temporary_state import meanwhile
from gift.core.weights.attach import release_tensors
from gift.core.weights.record import weight_deltas
from gift.errors import AdaptationError, refuse
from gift.private.torch.tensors import written_since
from gift.quantization import is_quantised
from gift.support.interrupts import switching
from gift.support.progress import slow


@switching
def merged(net: nn.Module) -> Iterator[nn.Module]:
    """Context in which deltas are merged into the weights, for inference at the speed of the base.

    Inside the context, the network is a plain one with all parameters frozen. It can be called,
    traced, exported and copied. Copies are plain networks, and its ``state_dict()`` has the merged
    weights. Loading a state into it, and whatever needs its deltas, is refused. After the context,
    the network is the same as before, bit for bit: merged weights, trained parameters and buffers
    are temporary copies, which need additional memory. Other frozen parameters are shared with the
    base and must not be written to. Computed weights, quantised weights and wrapped forward passes
    are not merged, and keep working.

    Args:
        net: a network that is being fine-tuned.

    Raises:
        RuntimeError: if it is not being fine-tuned, or is sharded; at the end of the context, if
            parameters of the base were written to.
        AdaptationError: if merged values are not finite.
    """
    check(net)
    snapshot = Snapshot(net)
    shared: dict[nn.Parameter, Callable[[], bool]] = {}
    try:
        for parameter in nn.Module.parameters(net):
            parameter.grad = None  # an optimizer skips parameters without gradient
        remove_record(net)
        _merge_copies(net)
        names = {p: name for name, p in net.named_parameters()}
        own = {id(kept.tensor) for _, _, kept in snapshot.parameters}
        shared = {p: written_since(p) for p in names if id(p) in own}
        for parameter in names:
            parameter.requires_grad = False
        set_class(net, _merged_class(type(net)))
        with meanwhile(net.modules(), "merged"):
            yield net
    finally:
        written = [names[p] for p, was_written in shared.items() if was_written()]
        snapshot.rollback()
        if written:
            raise RuntimeError(
                f"{written} of the base were written to while the network was merged: load the "
                "base again, and train or load outside of the with block"
            )


def _merge_copies(net: nn.Module) -> None:
    """Replace the tensors that are merged, or that may be written to, by copies."""
    staying = _staying(net)
    instead: dict[int, Any] = {id(t): _copied(t) for t in _written(net)}
    problems: list[str] = []
    for path, module in slow([*net.named_modules()], "merging"):
        values = {} if module in staying else effective(module)
        problems += without_values(path, module, values)
        for tensor, value in values.items():
            instead[id(module._parameters[tensor])] = nn.Parameter(value, requires_grad=False)
    refuse(AdaptationError, NOT_MERGED, problems)
    for module in net.modules():
        if module not in staying:
            wrappers = vars(module).pop("_gift_forwards", None)  # they stay
            release_tensors(module)
            if wrappers is not None:
                vars(module)["_gift_forwards"] = wrappers
        for holder in (module._parameters, module._buffers):
            holder.update({n: instead[id(t)] for n, t in holder.items() if id(t) in instead})
        if "_gift_mode" in vars(module):
            release_statistics(module)
            module.training = False  # freeze the statistics until ``train()`` is called


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied


def _written(net: nn.Module) -> Iterator[Tensor]:
    """Buffers, and parameters that an optimizer or a forward pass writes to."""
    for module in net.modules():
        # An embedding with `max_norm` rescales the rows that it looks up, in place.
        scaled = vars(module).get("max_norm") is not None
        held: list[Any] = [p for p in module._parameters.values() if p is not None]
        held = [p for p in held if scaled or p.requires_grad]
        held += [buffer for buffer in module._buffers.values() if buffer is not None]
        yield from (tensor for tensor in held if not is_lazy(tensor))


def _staying(net: nn.Module) -> set[nn.Module]:
    """Modules that keep their deltas, as their tensors or tied ones are computed or quantised."""
    users = [(module, weight_deltas(module)) for module in net.modules() if weight_deltas(module)]
    found = {m for m, own in users if not all(_is_plain(m._parameters.get(t)) for t in own)}
    while True:
        tied = {
            one
            for module, own in users
            for delta in own.values()
            for one, other in ((module, delta.owner), (delta.owner, module))
            if one is not None and other in found
        }
        if tied <= found:
            return found
        found |= tied


def _is_plain(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and not is_quantised(parameter)


class _Merged:
    """Mixin of a network that is merged temporarily."""

    _gift_unmerged: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass  # as in `gift.core.dynamic_class.Generated`

    def _load_from_state_dict(self, *args: Any) -> None:
        raise RuntimeError("the network is temporarily merged: load after the with block")

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        with _as_unmerged(self):
            return self.__reduce_ex__(0)  # from protocol 2 on, pickle compares classes

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _as_unmerged(self):
            return copy.deepcopy(self, memo)


@contextmanager
def _as_unmerged(network: Any) -> Iterator[None]:
    """Context in which the network has its class without `_Merged`, which copies get."""
    cls = type(network)
    set_class(network, cls._gift_unmerged)
    try:
        yield
    finally:
        set_class(network, cls)


def _merged_class(cls: type) -> type:
    """The class of a merged network, which refuses to load a state."""
    return subclass_with([_Merged], cls, {"_gift_unmerged": cls})
