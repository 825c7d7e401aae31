"""The layers that PEFT wraps, and where gift and PEFT would differ for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gift.core.dynamic_class import joined, plain_class
from gift.core.weights.record import WeightDelta
from gift.layers.blocks import fuses_layers
from gift.layers.table import operation_of, reader_of

# What PEFT has adapters for; of bitsandbytes' layers only the linear ones.
KINDS = {
    "linear": "linear",
    "packed linear": "linear",
    "transposed linear": "transposed",
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "conv3d": "conv3d",
    "embedding": "embedding",
    "attention": "attention",
}
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def kind_of(module: nn.Module) -> str:
    """Return the kind of a layer, "" if unknown; subclasses count if their forward is the same.

    PEFT calls the layer and adds to the result, while gift changes the weight that the layer
    reads. With another forward, these are different things.
    """
    return KINDS.get(operation_of(plain_class(type(module))), "")


@dataclass(frozen=True)
class AdaptedTensor:
    """An adapted tensor of a fine-tuned network.

    Args:
        path: path of the module.
        module: module that holds the tensor.
        tensor: name of the tensor in the module.
        delta: delta of the tensor.
        attention: path of the `nn.MultiheadAttention` to whose projections it belongs, if any.
    """

    path: str
    module: Any
    tensor: str
    delta: WeightDelta
    attention: str | None = None

    @property
    def name(self) -> str:
        """The dotted name of the tensor."""
        return joined(self.path, self.tensor)

    @property
    def is_layer(self) -> bool:
        """Whether PEFT wraps the layer for it, rather than the single parameter."""
        return self.tensor == "weight" and kind_of(self.module) != ""

    @property
    def values(self) -> dict[str, Tensor]:
        """The tensors that the method added, by its own names."""
        return {key: value.detach() for key, value in self.delta.tensors(self.module).items()}

    @property
    def frozen(self) -> Tensor:
        """The frozen tensor as matrix or matrices."""
        assert self.delta.layout is not None
        frozen: Tensor = self.module._gift_frozen(self.tensor)
        return self.delta.layout.to_matrix(frozen.detach())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the frozen tensor itself."""
        assert self.delta.layout is not None
        return self.delta.layout.shape


def layer_incompatibilities(module: Any, peft_type: str, kinds: tuple[str, ...]) -> Iterator[str]:
    """Yield why this layer cannot have the same adapter in gift and in PEFT."""
    kind = kind_of(module)
    if kind not in kinds:
        name = plain_class(type(module)).__name__
        own = f", a {name} with a forward of its own" if kind == "" else f", a {name}"
        yield f"{peft_type} of PEFT has no adapter for this layer{own}"
        return
    if kind in CONVOLUTIONS and peft_type != "IA3":
        yield from _convolution_incompatibilities(module, peft_type)
    if kind == "embedding" and module.max_norm is not None:
        yield "PEFT limits the norm of frozen rows and of A, not of what the two make (max_norm)"
    if kind == "attention" and module._parameters.get("in_proj_weight") is None:
        yield "PEFT adapts query, key and value only where they have one weight (no kdim, vdim)"


def _convolution_incompatibilities(module: Any, peft_type: str) -> Iterator[str]:
    if module.padding_mode != "zeros":
        yield f"PEFT pads the input of the adapter with zeros, here it is {module.padding_mode!r}"
    if module.groups != 1:
        yield f"PEFT adapts a convolution with groups={module.groups} as if it had none"
    if peft_type == "LORA" and set(module.dilation) != {1}:
        yield f"PEFT ignores dilation={module.dilation} in the adapter"


def context_incompatibilities(network: nn.Module, path: str) -> Iterator[str]:
    """Yield why a PEFT adapter has no effect at this place of a network."""
    above, _, name = path.rpartition(".")
    if not path:
        yield "PEFT adapts layers inside a network, not the network itself"
        return
    parent = network.get_submodule(above)
    if reader_of(parent, name):
        yield f"{plain_class(type(parent)).__name__} never calls it, and PEFT adapts calls"


def is_passed_by(network: nn.Module, path: str) -> bool:
    """Whether a layer is inside a torch encoder layer, whose fast path ignores adapters."""
    parts = path.split(".")
    parents = (network.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return any(map(fuses_layers, parents))
