"""The record of an adapted tensor, and how it computes the effective weight."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import contiguous, put_values
from gift.core.weights.fitted import FittedDelta
from gift.core.weights.frozen import Source, is_plain, plain_tensor, present_tensor
from gift.core.weights.graph import Slices
from gift.core.weights.making import WeightMaking
from gift.core.weights.parallel import (
    local_parameters,
    placements_of,
    spread_parameters,
    spread_weight,
)
from gift.core.weights.reading import Memory, made, made_once
from gift.core.weights.stacking import StackMaking, Together
from gift.errors import AdaptationError, GiftWarning
from gift.kernels.effective_linear import Made
from gift.kernels.remembered import Remembered
from gift.layers.layouts import bias_layout
from gift.layers.table import layout_of
from gift.quantization import dequantised, is_quantised, stand_in
from gift.support.sharding import (
    distributed,
    distributed_like,
    is_sharded,
    shape_only,
    whole,
)
from gift.support.tensors import is_finite


@dataclass
class WeightDelta(FittedDelta):
    """Record of one adapted tensor of a module.

    Args:
        bias_of: for a bias, the weights of the module to whose outputs it is added. It uses
            their delta, and the module is its owner.
        biased: for a weight, whether the bias that is added to its outputs is adapted too, so that
            the delta has the tensors of `Method.init_bias_parameters`.
        reads_alike: whether the layer's own row would read a tied tensor in the same way.
        below: the frozen delta on top of which this one is, see `gift.core.weights.stacking`.
        mesh_axes: the number of axes of the mesh over which tensor parallelism spreads the tensor,
            see `gift.core.weights.parallel`; 0 if it does not.
        memory: a weak reference to the effective weight that was read last.
        source: the frozen tensor from which the method derived parameters, see `note_source`.
    """

    bias_of: tuple[str, ...] = ()
    biased: bool = False
    reads_alike: bool = True
    below: "WeightDelta | None" = None
    mesh_axes: int = field(default=0, compare=False)
    memory: Memory = field(default_factory=Memory, compare=False, repr=False)
    source: "Source | None" = field(default=None, compare=False, repr=False)
    _remembered: Remembered | None = field(default=None, init=False, repr=False, compare=False)
    _is_sum: bool | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def remembered(self) -> Remembered:
        """What fast paths made of the tensors in the last call without gradients."""
        if self._remembered is None:
            self._remembered = Remembered()
        return self._remembered

    def own_names(self) -> list[str]:
        """Names on the module of all tensors that it holds for this delta and those under it."""
        under = [] if self.below is None else self.below.own_names()
        return [*under, *super().own_names()]

    @property
    def method_name(self) -> str:
        """The name of the method; those of a stack are joined by ``+``, the lowest first."""
        under = "" if self.below is None else f"{self.below.method_name}+"
        return under + self.method.name

    @property
    def reads_weight(self) -> bool:
        """Whether parameters of this delta or of one under it depend on the frozen values."""
        return self.method.reads_weight or (self.below is not None and self.below.reads_weight)

    def delta_of(self, module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        """The method and its parameters for the adapted tensor of `module`, without those below."""
        parameters = self.tensors(module)
        if self.source is not None and not torch.compiler.is_compiling():
            parameters.update(self._derived_anew(module, self.source, parameters))
        if self.bias_of and self.method.bias_reads_weight:
            parameters.update(self._frozen_matrices(module))
        return self.method, parameters

    def whole_delta_of(self, module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        """The method and parameters with which a low-rank fast path computes the whole delta."""
        method, parameters = self.delta_of(module)
        if self.below is None:
            return method, parameters
        lower = list(self._stack())[1:]
        for number, delta in enumerate(lower):
            own = delta.delta_of(module)[1]
            # The compiler of torch 2.6 knows no "|=" of dictionaries.
            parameters.update({f"{number}/{key}": value for key, value in own.items()})
        return Together(method, tuple(delta.method for delta in lower)), parameters

    def _stack(self) -> Iterator["WeightDelta"]:
        delta: WeightDelta | None = self
        while delta is not None:
            yield delta
            delta = delta.below

    def is_sum(self, module: nn.Module) -> bool:
        """Whether this delta and those under it are products of factors that can be added."""
        if self._is_sum is None:
            self._is_sum = self.layout is not None and all(
                d.layout == self.layout
                and d.reads_alike
                and d.method.low_rank_is_cheap
                and d.method.low_rank(d.tensors(module)) is not None
                for d in self._stack()
            )
        return self._is_sum

    def under(self, module: nn.Module, frozen: Tensor) -> Tensor:
        """What the method sees as the frozen weight: dequantised, with the delta under this one.

        A weight with such a delta has the precision with which that is computed.
        """
        frozen = dequantised(frozen, module)
        if self.below is None:
            return frozen
        making, tensors = self.below._making(module)
        return making(frozen.to(making.working_dtype(frozen)), *tensors)

    def _making(
        self, module: nn.Module, drops: bool = False
    ) -> tuple[WeightMaking | StackMaking, list[Tensor]]:
        """What makes the effective weight from the frozen one and which further tensors.

        Args:
            module: the module that holds the tensor.
            drops: whether dropout is drawn for it.
        """
        assert self.layout is not None
        method, parameters = self.delta_of(module)
        if drops:
            parameters = method.drop(parameters, self.layout.input_axis)
        making = WeightMaking(self.layout, method, tuple(parameters), bool(self.bias_of))
        if self.below is None:
            return making, list(parameters.values())
        lower, tensors = self.below._making(module)
        return StackMaking(lower, making, len(tensors)), [*tensors, *parameters.values()]

    def _frozen_matrices(self, module: nn.Module) -> dict[str, Tensor]:
        """What the method sees as the frozen matrices to whose outputs a bias is added."""
        found, own = {}, {*self.names.values()}
        for i, weight in enumerate(self.bias_of):
            levels = weight_deltas(module)[weight]._stack()
            level = next(d for d in levels if all(name in own for name in d.names.values()))
            assert level.layout is not None
            matrix = level.layout.to_matrix(level.under(module, plain_tensor(module, weight)))
            found[f"frozen.{i}" if len(self.bias_of) > 1 else "frozen"] = matrix
        return found

    def local_delta_of(
        self, module: nn.Module, frozen: Tensor, partial: Sequence[bool]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The method and the parts of its parameters with which this process computes.

        See `gift.core.weights.parallel.local_parameters`.
        """
        assert self.layout is not None
        method, parameters = self.delta_of(module)
        return method, local_parameters(method, self.layout, frozen, parameters, partial)

    def spread(self, frozen: Tensor, like: Any) -> nn.Parameter:
        """The frozen tensor, spread as a tensor of tensor parallelism is that takes its place.

        Raises:
            AdaptationError: if the method cannot be computed for a part of it.
        """
        if self.layout is None:
            raise AdaptationError("it has no shape yet: run a batch through the network first")
        if self.below is not None:
            raise AdaptationError("a delta on top of another one cannot be spread over processes")
        placements_of(self.method, self.layout, like.placements, self.names)
        self.mesh_axes, self.source = _axes_of(like), None
        return nn.Parameter(distributed_like(frozen.detach(), like), requires_grad=False)

    def spread_tensor(self, frozen: Any, name: str, value: nn.Parameter) -> nn.Parameter:
        """A parameter of the delta, spread to suit the frozen tensor."""
        assert self.layout is not None
        beside = placements_of(self.method, self.layout, frozen.placements, self.names)
        (key,) = (key for key, own in self.names.items() if own == name)
        made = distributed(value.detach(), frozen.device_mesh, beside[key])
        return nn.Parameter(made, value.requires_grad)

    def is_away(self, frozen: Tensor | None) -> bool:
        """Whether FSDP2 has put only a shard of the tensor in its place for now."""
        # FSDP2 asks a module for its leaf tensor while the parameters are sharded. The effective
        # weight exists only between unshard and reshard. The mesh of a shard of a tensor that is
        # spread already has more axes.
        return frozen is not None and is_sharded(frozen) and _axes_of(frozen) != self.mesh_axes

    def note_source(self, module: nn.Module, tensor: str) -> None:
        """Record the frozen tensor from which the method derived parameters, if it did.

        Other code may replace that tensor for one call, as `torch.func.functional_call` does.
        """
        if self.below is not None:
            self.below.note_source(module, tensor)
        frozen, derives = module._parameters.get(tensor), self.method.derives
        if frozen is not None and derives and is_plain(frozen) and not is_lazy(frozen):
            derived = self.tensors(module)[derives[0]]
            self.source = Source(tensor, frozen.data_ptr(), id(derived))

    def _derived_anew(
        self, module: nn.Module, source: "Source", parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Derived parameters for a tensor that replaces the recorded one; empty if none does."""
        if id(parameters[self.method.derives[0]]) != source.derived:
            self.note_source(module, source.tensor)  # both were moved or replaced
            return {}
        frozen: Any = module._parameters.get(source.tensor)
        if not is_plain(frozen) or source.is_of(frozen):
            return {}
        assert self.layout is not None
        made = self.method.derived(self.layout.to_matrix(self.under(module, frozen)))
        return {key: contiguous(value) for key, value in made.items()}

    def weight(self, module: nn.Module, frozen: Tensor) -> Tensor:
        """The effective weight in the frozen one's dtype, rounded once."""
        if self.layout is None or self.is_away(frozen):
            return frozen
        if self.mesh_axes:
            method, parameters = self.delta_of(module)
            return spread_weight(
                method, self.layout, frozen, parameters, module.training, bool(self.bias_of)
            )
        making, tensors = self._making(module, bool(self.method.dropout) and module.training)
        return making(dequantised(frozen, module), *tensors)

    def read(self, module: nn.Module, frozen: Tensor) -> Tensor:
        """The effective weight through the cache of `gift.core.weights.reading`."""
        given = self._for_cache(module, frozen)
        return self.weight(module, frozen) if given is None else made_once(*given)

    def made(self, module: nn.Module, frozen: Tensor) -> Made | None:
        """The effective weight in parts, for functions that do not save it; None if `read` must do.

        A plain weight without a graph of its own is what they can take.
        """
        given = None if frozen.requires_grad else self._for_cache(module, frozen)
        return None if given is None else made(*given)

    def _for_cache(self, module: nn.Module, frozen: Tensor) -> tuple[Any, ...] | None:
        """The arguments of `made_once`; None if each read makes the weight anew."""
        if self.layout is None or is_sharded(frozen) or self.mesh_axes or is_quantised(frozen):
            return None
        # Dynamo would guard on the ids below, and compile again for a delta that is alike.
        if torch.compiler.is_compiling():
            return None
        if self.method.dropout and module.training:  # each read draws a mask
            return None
        making, tensors = self._making(module)
        of = tuple(id(part) for delta in self._stack() for part in (delta.layout, delta.method))
        return module, making, (frozen, *tensors), self.memory, of

    def slices(self, module: nn.Module, frozen: Tensor) -> Slices | None:
        """The matrices of a weight that is a batch of them; None if they cannot be read singly."""
        if self.layout is None or len(self.layout.matrix) != 3 or not self.layout.is_trivial:
            return None
        if self.below is not None:
            return None
        method, parameters = self.delta_of(module)
        if (method.dropout and module.training) or frozen.requires_grad or is_quantised(frozen):
            return None
        making = WeightMaking(self.layout, method, tuple(parameters), bool(self.bias_of))
        factors = making.factors((frozen, *parameters.values()))
        if factors is None or not any(factor.requires_grad for factor in factors):
            return None
        return Slices(*factors, frozen)

    def has_effect(self, module: nn.Module, key: str) -> bool:
        """Whether the effective tensor differs from the frozen one.

        False if the frozen tensor is not finite, as uninitialized memory may be.
        """
        frozen = present_tensor(module, key)
        if self.layout is None or frozen.is_meta or is_sharded(frozen) or self.is_on_meta(module):
            return False
        frozen = dequantised(frozen, module)
        lower = self.under(module, frozen).to(frozen.dtype)
        return is_finite(frozen) and not torch.equal(trained_value(self, module, frozen), lower)

    def reset(self, module: nn.Module, key: str) -> None:
        """Give the delta its initial values, and a shape if it is lazy."""
        if self.bias_of:
            if not self.of_base:
                self.link_to_weights(module, key)
            return
        if self.owner is not None:
            self.layout = weight_deltas(self.owner)[key].layout
            return
        if self.below is not None:
            self.below.reset(module, key)
        frozen = self._frozen(module, key)
        if is_lazy(frozen):
            return
        unknown = self.layout is None
        if self.layout is None:
            layout = layout_of(module, key, frozen.shape, self.options)
            self.method, self.layout = self.method.nearest(layout.matrix), layout
            if self.clipped:  # no layer is known yet that can have the size
                refused = f"{type(module).__name__}, {key}: {self.refusal()}"
                message = f"{refused}; it got {self.method.size}"
                warnings.warn(message, GiftWarning, stacklevel=2)
        # If a state was loaded before the first forward pass, keep its values.
        put_values(module, self.initial(frozen), only_lazy=unknown)
        self.note_source(module, key)

    def place(self, module: nn.Module, tensor: str, first: int, total: int) -> None:
        """Settle which part of a whole the matrix is, see `Method.placed`."""
        self.method = self.method.placed(first, total)
        for name, value in self.initial(stand_in(present_tensor(module, tensor))).items():
            # Not written in place: other networks may hold the same buffer.
            if name in module._non_persistent_buffers_set:
                module._buffers[name] = value

    def link_to_weights(self, module: nn.Module, bias: str) -> None:
        """Use the names, layout and method of the weights' deltas for a bias."""
        deltas = [weight_deltas(module)[weight] for weight in self.bias_of]
        several = len(deltas) > 1
        self.names = {
            f"{key}.{i}" if several else key: name
            for i, delta in enumerate(deltas)
            for key, name in delta.names.items()
        }
        self.method = deltas[0].method
        layouts = [delta.layout for delta in deltas if delta.layout is not None]
        if len(layouts) == len(deltas):
            frozen = present_tensor(module, bias)
            self.layout = bias_layout(frozen.numel(), layouts)
            self.mesh_axes = _axes_of(frozen) if is_sharded(frozen) else 0

    def initial(self, frozen: Tensor, of_bias: bool = False) -> dict[str, Tensor]:
        """The method's initial parameters for the frozen tensor, by their names on the module.

        Args:
            frozen: the frozen tensor.
            of_bias: return only those for the bias that is added to its outputs.
        """
        assert self.layout is not None
        readable = frozen
        if is_sharded(frozen):
            readable = whole(frozen) if self.method.reads_weight else shape_only(frozen)
        mode = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with mode, torch.no_grad():
            matrix = self.layout.to_matrix(readable.detach())
            made = {} if of_bias else self.method.init_parameters(matrix)
            if of_bias or self.biased:
                made |= self.method.init_bias_parameters(matrix)
        made = {key: contiguous(value) for key, value in made.items()}
        if is_sharded(frozen):
            made = spread_parameters(self.method, self.layout, frozen, made)
            self.mesh_axes = _axes_of(frozen)
        return {self.names.get(key, key): value for key, value in made.items()}

    def rederive(self, module: nn.Module, tensor: str) -> None:
        """Derive parameters again after the frozen tensor got new values.

        These are the parameters that are never saved and, while the delta has no effect yet, all of
        them.
        """
        if self.below is not None:
            self.below.rederive(module, tensor)
        if self.owner is not None or self.layout is None or not self.method.reads_weight:
            return
        frozen = self._frozen(module, tensor)
        if self.is_away(frozen):
            frozen = whole(frozen)
        made = self.initial(frozen)
        derived = {k: v for k, v in made.items() if k in module._non_persistent_buffers_set}
        put_values(module, derived)
        with torch.no_grad():
            own, tensors = self.delta_of(module)
            making = WeightMaking(self.layout, own, tuple(tensors))
            untrained = torch.equal(making(frozen, *tensors.values()), frozen)
        if untrained:
            put_values(module, made)

    def _frozen(self, module: nn.Module, tensor: str) -> Tensor:
        frozen: Tensor = present_tensor(module, tensor)
        return frozen if is_lazy(frozen) else self.under(module, frozen)


def _axes_of(tensor: Any) -> int:
    axes: int = tensor.device_mesh.ndim
    return axes


def weight_deltas(module: nn.Module) -> Mapping[str, WeightDelta]:
    """Records of the adapted tensors of `module` itself, by name."""
    deltas: Mapping[str, WeightDelta] = module.__dict__.get("_gift_weights", {})
    return deltas


def present_weight_deltas(module: nn.Module) -> dict[str, WeightDelta]:
    """Those of the present strategy, without those of its base."""
    return {name: delta for name, delta in weight_deltas(module).items() if not delta.of_base}


def trained_value(delta: WeightDelta, module: nn.Module, frozen: Tensor) -> Tensor:
    """The effective weight without dropout and graph, whatever mode the module is in."""
    training, module.training = module.training, False
    try:
        with torch.no_grad():
            return delta.weight(module, frozen).detach()
    finally:
        module.training = training
