"""Find tensors that share memory but would be fine-tuned in different ways.

A tensor with several names is one tensor, see `gift.engine.ties`. This module is about distinct
tensors over the same memory (a view of another tensor, a buffer or an attribute that shows a
weight), and about a parameter of two networks. What one place does to the memory is not known to
the other.
"""

import gc
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.frozen_base import fine_tuned_networks
from gift.core.undo.snapshot import Snapshot
from gift.core.undo.temporary_state import modules_meanwhile
from gift.core.weights.record import weight_deltas
from gift.errors import some
from gift.layers.table import row_of
from gift.private.torch.tensors import storage_key
from gift.quantization import is_quantised
from gift.support.tensors import holds_no_tensors, is_plain


class Holder(NamedTuple):
    """One place that holds a tensor.

    Args:
        module, name: the module, and the name there.
        tensor: the tensor.
        kind: "parameter", "buffer" or "attribute".
    """

    module: nn.Module
    name: str
    tensor: Tensor
    kind: str


def memory_conflicts(network: nn.Module, before: Snapshot) -> list[str]:
    """Report tensors that share memory with an adapted or trained weight but must stay unchanged.

    Args:
        network: the network, after the caps were applied.
        before: a snapshot of the network before that.
    """
    found = _conflicts_within(network, before)
    if not _others(network):
        return found
    paths = {module: path for path, module in network.named_modules()}
    trained = [
        holder._replace(name=joined(paths[holder.module], holder.name))
        for holder in _holders(before)
        if holder.module in paths and _fate(holder, set()) == "trained"
    ]
    return found + _moved_elsewhere(network, trained)


def _conflicts_within(network: nn.Module, before: Snapshot) -> list[str]:
    starts = [_start(holder.tensor) for holder in _holders(before)]
    if len({*starts}) == len(starts):  # the common case, for which numbers are enough
        return []
    groups: dict[int, list[Holder]] = {}
    for holder in _holders(before):
        groups.setdefault(storage_key(holder.tensor), []).append(holder)
    shared = [group for group in groups.values() if len(group) > 1]
    paths = {module: path for path, module in network.named_modules()}
    adapted = {
        id(module._parameters.get(tensor)) for module in paths for tensor in weight_deltas(module)
    }
    wrong = []
    for group in shared:
        there = [holder for holder in group if holder.module in paths]
        for one, other in _overlapping(there):
            fates = [(_fate(h, adapted), joined(paths[h.module], h.name)) for h in (one, other)]
            fates.sort(key=lambda fate: fate[0] not in ("adapted", "trained"))
            if _contradict(*(fate for fate, _ in fates)):
                wrong.append(", ".join(f"{name} is {fate}" for fate, name in fates))
    if not wrong:
        return []
    return [
        "these tensors share memory, but fine-tuning would treat them differently: "
        f"{some(wrong, 5)}. Register one parameter under both names, so that it is tied; or give "
        "one of them its own memory (.clone()); or let the same cap match both"
    ]


def _holders(before: Snapshot) -> Iterator[Holder]:
    seen: set[int] = set()
    for module, name, kept in before.parameters:
        if id(kept.tensor) not in seen and is_plain(kept.tensor):
            seen.add(id(kept.tensor))
            yield Holder(module, name, kept.tensor, "parameter")
    for module, name, kept in before.buffers:
        if is_plain(kept.tensor):
            yield Holder(module, name, kept.tensor, "buffer")
    for module, _, state, _ in before.modules:
        if holds_no_tensors(state.values()):  # the common case
            continue
        for name, value in state.items():
            for tensor in _attributes(module, value):
                yield Holder(module, name, tensor, "attribute")


def _attributes(module: nn.Module, value: object) -> Iterator[Tensor]:
    """The tensors in an attribute, except lists of weights that are rebuilt when adapted."""
    if isinstance(value, Tensor):
        found: Iterable[Any] = (value,)
    elif isinstance(value, list | tuple):
        row = row_of(plain_class(type(module)))
        items: Any = list if isinstance(value, list) else tuple  # its class may be somebody's own
        found = () if row is not None and row.mixin is not None else items.__iter__(value)
    else:
        return
    yield from (t for t in found if isinstance(t, Tensor) and is_plain(t))


def _fate(holder: Holder, adapted: set[int]) -> str:
    if holder.kind != "parameter":
        return f"a plain {holder.kind}" if holder.kind == "attribute" else "a buffer"
    if id(holder.tensor) in adapted:
        return "adapted"
    return "trained" if holder.tensor.requires_grad else "frozen"


def _contradict(one: str, other: str) -> bool:
    """Whether two fates of the same memory exclude each other.

    Training in place is seen by every tensor over the memory, but must not move a frozen parameter.
    """
    return ("adapted" in (one, other) and one != other) or {one, other} == {"trained", "frozen"}


def _overlapping(holders: Iterable[Holder]) -> Iterator[tuple[Holder, Holder]]:
    """Pairs of tensors over the same storage that have at least one element in common."""
    spans = sorted(((*_span(h.tensor), h) for h in holders), key=lambda span: span[:2])
    for number, (_, end, one) in enumerate(spans):
        for start, _, other in spans[number + 1 :]:
            if start >= end:
                break
            if _share(one.tensor, other.tensor):
                yield one, other


def _start(tensor: Tensor) -> int:
    """The address of a tensor's storage, without making Python's object for the storage."""
    return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The offset of a tensor's first byte in its storage, and the offset after its last byte."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps) if tensor.numel() else -1
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (first + last + 1) * size


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether tensors whose spans overlap have an element in common."""
    gapless = one.is_contiguous() and other.is_contiguous()
    if gapless or one.element_size() != other.element_size():
        return True
    count = one.untyped_storage().nbytes() // one.element_size()
    places = torch.arange(count, device="cpu")
    shown = torch.zeros(count, dtype=torch.bool, device="cpu")
    own, others = (places.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (one, other))
    shown[own.reshape(-1)] = True
    return bool(shown[others.reshape(-1)].any())


def refuse_held_elsewhere(network: nn.Module) -> None:
    """Refuse a network that shares a parameter with another one that is being fine-tuned.

    Raises:
        RuntimeError: naming the parameter.
    """
    if _held_elsewhere(network) is None:
        return
    gc.collect()  # the other network may be garbage
    if found := _held_elsewhere(network):
        name, other = found
        raise RuntimeError(
            f"{name} is also a parameter of another {plain_class(type(other)).__name__} that is "
            "being fine-tuned: merging or disabling one would change the base of the other. "
            "Fine-tune a module that contains both (nn.ModuleList([a, b])), or copy one of them"
        )


def unmovable(network: nn.Module, names: Collection[str], later: Collection[str]) -> list[str]:
    """Report parameters whose training in place would move what must stay, with the reason.

    Args:
        network: the network.
        names: names of parameters that are about to be trained in place.
        later: names of those that are trained in place at some time.
    """
    holders = [
        Holder(module, joined(path, name), parameter, "parameter")
        for path, module in network.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_plain(parameter)
    ]
    named = {h.name for h in holders} & {*names}
    trained = [h for h in holders if h.name in named]
    adapted = {id(m._parameters.get(t)) for m in network.modules() for t in weight_deltas(m)}
    moving = {id(h.tensor) for h in holders if h.name in named or h.name in later}
    staying = [h for h in holders if id(h.tensor) not in moving
               and (id(h.tensor) in adapted or not h.tensor.requires_grad)]  # fmt: skip
    found = [f"{one}: it shares memory with {other.name}, which is not trained in place with it"
             for one, other in _shared(trained, staying)]  # fmt: skip
    return found + _moved_elsewhere(network, trained)


def _moved_elsewhere(network: nn.Module, trained: Sequence[Holder]) -> list[str]:
    """Report trained parameters whose memory another network that is being fine-tuned shows."""
    if any(_shared(trained, _bases_of_others(network))):
        gc.collect()  # the other network may be garbage
    return [
        f"{one}: a {plain_class(type(other.module)).__name__} that is being fine-tuned, as copies "
        "by gift.reference are, shares its memory, and would change too: copy it (copy.deepcopy), "
        "or train only deltas"
        for one, other in _shared(trained, _bases_of_others(network))
    ]


def _shared(trained: Iterable[Holder], others: Iterable[Holder]) -> Iterator[tuple[str, Holder]]:
    """Names of trained parameters, each with another tensor that shows an element of it."""
    groups: dict[int, list[Holder]] = {}
    for other in others:
        groups.setdefault(storage_key(other.tensor), []).append(other)
    for one in trained if groups else ():
        same = groups.get(storage_key(one.tensor), ())
        overlapping = (other for other in same if _overlap(one.tensor, other.tensor))
        yield from ((one.name, other) for other in itertools.islice(overlapping, 1))


def _overlap(one: Tensor, other: Tensor) -> bool:
    (start, end), (first, last) = _span(one), _span(other)
    return start < last and first < end and _share(one, other)


def _bases_of_others(network: nn.Module) -> Iterator[Holder]:
    """The parameters of other networks that are being fine-tuned, without their deltas."""
    for other in _others(network):
        for parameter in _base_of(other):
            if parameter is not None and is_plain(parameter):
                yield Holder(other, "", parameter, "parameter")


def _others(network: nn.Module) -> set[nn.Module]:
    """Other networks that are being fine-tuned now, or are their base for a while."""
    others = {*fine_tuned_networks(), *modules_meanwhile()}
    return others - {*network.modules()} if others else others


def _held_elsewhere(network: nn.Module) -> tuple[str, nn.Module] | None:
    if not (others := _others(network)):
        return None
    own = {id(p): name for name, p in nn.Module.named_parameters(network)}
    for other in others:
        for parameter in _base_of(other):
            # Quantised tensors are never changed in place, and reference copies share them.
            if id(parameter) in own and not is_quantised(parameter):
                return own[id(parameter)], other
    return None


def _base_of(other: Any) -> Iterable[Any]:
    """The parameters of the base of another network."""
    record = vars(other).get("_gift_network")
    if record is None:  # disabled temporarily
        return nn.Module.parameters(other)
    return (module._parameters.get(name) for module, name, _ in record.undo.requires_grad)
