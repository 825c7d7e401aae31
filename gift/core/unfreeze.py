"""Unfreeze and freeze parameters of the base while a network is being fine-tuned."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import added_names
from gift.core.dynamic_class import joined, plain_class
from gift.core.frozen_base import hold_flags
from gift.core.record import record_of
from gift.core.undo.undo import put_value, tensor_of
from gift.core.weights.record import weight_deltas
from gift.errors import AdaptationError
from gift.layers.table import row_of
from gift.quantization import is_quantised
from gift.support.tensors import is_inexact

if TYPE_CHECKING:
    from gift.core.record import NetworkRecord


class NamedParameter(NamedTuple):
    """A parameter of a network with all its names.

    Args:
        paths: its dotted names, several if it is tied.
        module: a module that holds it.
        name: its name there.
    """

    paths: set[str]
    module: nn.Module
    name: str


def unfreeze(network: nn.Module, names: Iterable[str]) -> None:
    """Train these parameters of the base in place, or resume training of parameters on hold.

    If the base is kept (``keep_base``), the present values are saved first, so that disabling can
    restore them. The parameters then belong to ``parameters()`` and ``state_dict()``, and
    `gift.save` saves them. The gradient of an adapted parameter is that of the effective weight.

    Args:
        network: a network that is being fine-tuned.
        names: of parameters, including those of deltas that `hold_frozen` froze.

    Raises:
        AdaptationError: naming all that cannot be trained in place; nothing is changed then.
    """
    record = record_of(network)
    wanted = set(names)
    if problems := [f"{n}: {why}" for n, why in untrainable(network).items() if n in wanted]:
        raise AdaptationError("these cannot be trained as they are, nothing was changed", problems)
    kept = {id(tensor_of(m, name)) for m, name, _ in record.undo.values}
    parameters = _named(network, wanted)
    for names_of_it, module, name in parameters:
        if record.chosen.isdisjoint(names_of_it):
            tensor = tensor_of(module, name)
            if record.keeps_base and id(tensor) not in kept:
                record.undo.values.append((module, name, tensor.detach().clone()))
            record.chosen |= names_of_it
            record.late |= names_of_it
        record.waiting -= names_of_it
    _set_flags(record, parameters, True)
    hold_flags(network)


def hold_frozen(network: nn.Module, names: Iterable[str]) -> None:
    """Freeze these parameters until `unfreeze`; chosen ones stay chosen and are still saved."""
    record = record_of(network)
    parameters = _named(network, set(names))
    for names_of_it, *_ in parameters:
        record.waiting |= names_of_it & record.chosen
    _set_flags(record, parameters, False)
    hold_flags(network)


def refreeze(network: nn.Module, names: Iterable[str]) -> None:
    """Undo `unfreeze`: restore the base values of what it chose, and hold the others frozen.

    Raises:
        RuntimeError: if the base values were not kept; nothing is changed then.
    """
    record = record_of(network)
    late = set(names) & record.late
    if late and not record.keeps_base:
        raise RuntimeError(
            f"{sorted(late)[0]} cannot be frozen again: enable_fine_tuning had keep_base=False"
        )
    hold_frozen(network, names)
    values = {id(tensor_of(m, name)): value for m, name, value in record.undo.values}
    for names_of_it, module, name in _named(network, late):
        tensor = tensor_of(module, name)
        with torch.no_grad():
            put_value(tensor, values.pop(id(tensor)))
        record.chosen -= names_of_it
        record.late -= names_of_it
        record.waiting -= names_of_it
    hold_flags(network)
    record.undo.values = [
        entry for entry in record.undo.values if id(tensor_of(*entry[:2])) in values
    ]


def keep_values(
    network: nn.Module, new: Mapping[str, Tensor], frozen: set[str], deltas: set[str]
) -> None:
    """Save the values of frozen parameters that loading a trained state is about to change.

    In that state they were trained, because a schedule unfroze them; here they are still frozen. A
    checkpoint of the base is different: it becomes the new base.

    Args:
        network: a network that is being fine-tuned.
        new: the state.
        frozen: names of the parameters that are not trained.
        deltas: names of the tensors that methods added.
    """
    record = record_of(network)
    trained = not deltas.isdisjoint(new) if deltas else record.chosen <= new.keys()
    late = frozen & new.keys()
    if not trained or late == frozen or not record.keeps_base:
        return
    kept = {id(tensor_of(m, name)) for m, name, _ in record.undo.values}
    for names_of_it, module, name in _named(network, late):
        tensor, value = tensor_of(module, name), new[min(names_of_it & late)]
        if id(tensor) in kept or _unfit(tensor) or tensor.is_meta or tensor.shape != value.shape:
            continue
        if not torch.equal(tensor, value.to(tensor)):
            record.undo.values.append((module, name, tensor.detach().clone()))


def flags_of_the_base(network: nn.Module) -> dict[str, bool]:
    """For each parameter of a fine-tuned network, whether it was trainable before fine-tuning."""
    record = record_of(network)
    before = {
        id(parameter): flag
        for module, name, flag in record.undo.requires_grad
        if (parameter := module._parameters.get(name)) is not None
    }
    named = network.named_parameters(remove_duplicate=False)
    return {name: before.get(id(p), p.requires_grad) for name, p in named}


def untrainable(network: nn.Module) -> Mapping[str, str]:
    """The base parameters that cannot be trained in place, each with the reason.

    A parameter appears under all of its names.
    """
    parts = list(network.named_modules(remove_duplicate=False))
    read = {id(p): method for _, module in parts for p, method in _read(module)}
    found: dict[str, str] = {}
    for path, module in parts:
        added = added_names(module)
        for name, parameter in module._parameters.items():
            if parameter is None or name in added:
                continue
            if id(parameter) in read:
                found[joined(path, name)] = _READ.format(read[id(parameter)])
            elif why := _unfit(parameter):
                found[joined(path, name)] = why
    return found


def unfreezable_problems(network: nn.Module, trained: Sequence[nn.Parameter]) -> list[str]:
    """For each name of those that must not be trained the reason: a delta is made from them, or
    they are packed, so that no gradient reaches them.
    """
    if not trained:
        return []
    read = {id(p): method for module in network.modules() for p, method in _read(module)}
    why = {id(p): _READ.format(read[id(p)]) for p in trained if id(p) in read}
    why |= {id(p): reason for p in trained if (reason := packed_values(p))}
    named = network.named_parameters(remove_duplicate=False) if why else ()
    return [f"{name}: {why[id(p)]}" for name, p in named if id(p) in why]


def _read(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The parameters whose values a delta was made from, and the name of the delta's method."""
    reading = {t: a for t, a in weight_deltas(module).items() if a.reads_weight}
    row = row_of(plain_class(type(module))) if reading else None
    apart = {*added_names(module), *(row.names(module, row.biases) if row is not None else ())}
    for tensor, delta in reading.items():
        # A computed tensor is not a parameter: it may be computed from any parameter of the module.
        own = [tensor] if tensor in module._parameters else module._parameters.keys() - apart
        for name in own:
            if (parameter := module._parameters[name]) is not None:
                yield parameter, delta.method_name
    computing = module._modules.get("parametrizations") if reading else None
    for name, parameter in computing.named_parameters() if computing is not None else ():
        if (tensor := name.partition(".")[0]) in reading:
            yield parameter, reading[tensor].method_name


_READ = (
    "its delta, by {}, is derived from the frozen values, which must not change: train only "
    "deltas, or adapt it by another method"
)


_PACKED = "its values are packed by quantisation"


def packed_values(parameter: nn.Parameter) -> str:
    """Why no gradient reaches a parameter; empty if one does."""
    return f"{_PACKED}: train a delta (ma_adapt, pa_adapt)" if is_quantised(parameter) else ""


def _unfit(parameter: Tensor) -> str:
    if is_lazy(parameter):
        return "it has no shape yet: run a batch through the network first"
    if is_quantised(parameter):
        return _PACKED
    return "" if is_inexact(parameter) else f"it is {parameter.dtype}"


def _named(network: nn.Module, names: set[str]) -> list[NamedParameter]:
    """All names, the module and the name there of each tensor that has one of these names."""
    found: dict[int, NamedParameter] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = found.setdefault(id(parameter), NamedParameter(set(), module, name))
                own.paths.add(joined(path, name))
    if unknown := names.difference(*(known for known, *_ in found.values())):
        raise KeyError(f"the network has no parameters {sorted(unknown)}")
    return [one for one in found.values() if one.paths & names]


def _set_flags(record: "NetworkRecord", parameters: Iterable[NamedParameter], flag: bool) -> None:
    undo = record.undo
    known = {id(module._parameters.get(name)) for module, name, _ in undo.requires_grad}
    for _, module, name in parameters:
        parameter = module._parameters[name]
        assert parameter is not None
        own = id(parameter) not in known and name not in added_names(module)
        if own and parameter.requires_grad != flag:
            undo.requires_grad.append((module, name, parameter.requires_grad))
        parameter.requires_grad = flag
        if not flag:
            parameter.grad = None  # an optimizer would still apply it
