"""Read what a delta changes from a network in which it is active."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.forwards import named_forward_deltas
from gift.core.record import record_of
from gift.core.trained import named_trainable
from gift.core.undo.snapshot import transaction
from gift.core.undo.undo import tensor_of
from gift.core.undo.unload import UnloadedDelta
from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import WeightDelta, present_weight_deltas, trained_value
from gift.layers.layouts import Layout, LayoutOptions
from gift.quantization import dequantised
from gift.support.tensors import is_inexact, wide


@dataclass(frozen=True)
class Change:
    """The change of one weight.

    Args:
        name: path of the weight; for tied weights, the first one.
        module: the module that holds the weight and the delta.
        tensor: name of the weight in the module.
        layout: how the weight is read as a matrix.
        options: the choice of layouts.
        dtype: dtype of the delta.
        factors: ``(left, right)`` whose product is the change, or None.
        matrix: the change as a matrix, in double precision, if there are no factors.
    """

    name: str
    module: nn.Module
    tensor: str
    layout: Layout
    options: LayoutOptions
    dtype: torch.dtype
    factors: tuple[Tensor, Tensor] | None
    matrix: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the change as a matrix, in double precision."""
        if self.factors is None:
            assert self.matrix is not None
            return self.matrix
        left, right = self.factors
        return wide(left) @ wide(right)


@dataclass
class Changes:
    """Everything that a delta changes.

    Args:
        weights: changes of weights, by the path of the weight.
        tied: paths of further tensors that read one of these deltas.
        values: the network's own parameters that are trained, whether or not they have moved, and
            buffers that have; with base and present values.
        foreign: descriptions of all other changes.
    """

    weights: dict[str, Change] = field(default_factory=dict)
    tied: dict[str, tuple[nn.Module, str, WeightDelta]] = field(default_factory=dict)
    values: dict[str, tuple[nn.Module, str, Tensor, Tensor]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)


def changes_of(net: Any, delta: UnloadedDelta, dense: bool) -> Changes:
    """Return what a delta changes; it is attached to the base for that, and unloaded again.

    Args:
        net: the base.
        delta: the delta.
        dense: whether to compute the dense change of weights that have no factors.
    """
    with transaction(net), delta.attached():
        return _read(net, dense)


def _read(net: Any, dense: bool) -> Changes:
    paths = {id(module): path for path, module in net.named_modules()}
    found = Changes(foreign=list(_foreign(net, paths)))
    first: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    for path, module in net.named_modules():
        for tensor, delta in present_weight_deltas(module).items():
            name = joined(path, tensor)
            if delta.owner is not None and not delta.bias_of:
                found.tied[name] = module, tensor, delta
            else:
                whole = first.get(id(module._parameters.get(tensor)), name)
                found.weights[name] = _change(whole, module, tensor, delta, dense)
    trained = {id(parameter) for _, parameter in named_trainable(net)}
    for module, name, base in record_of(net).undo.values:
        own = tensor_of(module, name)
        now = own.detach()
        if id(module) in paths and (id(own) in trained or not torch.equal(now, base)):
            found.values[joined(paths[id(module)], name)] = module, name, base, now.clone()
    return found


def _foreign(net: Any, paths: Mapping[int, str]) -> Iterator[str]:
    """Yield descriptions of changes that are not changes of a weight or value."""
    record = record_of(net)
    for path, _, wrapper in named_forward_deltas(net):
        if wrapper.names:
            yield f"{path or 'the network'} is wrapped by {wrapper.method}"
    for undo in record.undo.modules:
        for name in undo.entries.get("_modules", ()):
            yield f"{joined(paths.get(id(undo.module), ''), name)} was replaced"


def _change(name: str, module: nn.Module, tensor: str, delta: WeightDelta, dense: bool) -> Change:
    assert delta.layout is not None
    method, parameters = delta.delta_of(module)
    with torch.no_grad():
        factors = None if delta.bias_of else method.low_rank(parameters)
        factors = factors and (factors[0].detach().clone(), factors[1].detach().clone())
        matrix = None
        if factors is None and dense:
            matrix = _difference(module, tensor, delta)
    dtype = torch.float32
    for value in parameters.values():
        if is_inexact(value):
            dtype = torch.promote_types(dtype, value.dtype)
    return Change(name, module, tensor, delta.layout, delta.options, dtype, factors, matrix)


def _difference(module: nn.Module, tensor: str, delta: WeightDelta) -> Tensor:
    """Return the effective matrix minus the frozen one."""
    frozen = wide(dequantised(present_tensor(module, tensor).detach(), module))
    assert delta.layout is not None
    return delta.layout.to_matrix(trained_value(delta, module, frozen) - frozen)


def moved_values(changes: Changes) -> Iterator[str]:
    """Return the names of the network's own parameters and buffers that have other values."""
    return (name for name, (*_, base, now) in changes.values.items() if not torch.equal(now, base))


def trained_values(changes: Changes) -> Iterator[str]:
    """Return the names of the network's own parameters that are trained."""
    return (name for name, (module, own, *_) in changes.values.items() if own in module._parameters)
