"""What a way of adapting in PEFT is here: `Form`, of which the files beside this one make some."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.weights.record import plain_tensor
from gift.interop.peft.layers import CONVOLUTIONS, Place, kind_of
from gift.interop.peft.names import by_pattern, exact_pattern
from gift.layers.table import Layout, LayoutOptions, layout_of
from gift.quantization import dequantised

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass
class Written:
    """What a network becomes in PEFT.

    Args:
        config: the part of the configuration that is the form's own.
        tensors: by the rest of their keys after the prefix that all have.
        shared: by their whole keys.
        targets: the modules that PEFT will wrap.
        parameters: the single parameters that it will.
        problems: why it cannot be written.
    """

    config: Config = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors beside a layer."""
        self.targets.add(path)
        self.tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in tensors.items()}


@dataclass(frozen=True)
class Layer:
    """What a file has for one layer of a network.

    Args:
        network: the base.
        path: of the layer, or of the module that holds the parameter.
        module: the layer.
        tensors: by the end of their keys.
        tensor: the name of what is adapted.
        single: whether PEFT adapts that alone, and not the layer.
    """

    network: nn.Module
    path: str
    module: Any
    tensors: Tensors
    tensor: str = "weight"
    single: bool = False

    @property
    def kind(self) -> str:
        """Which layer it is."""
        return kind_of(self.module)

    @property
    def weight(self) -> Tensor:
        """The tensor of the base."""
        return dequantised(plain_tensor(self.module, self.tensor), self.module).detach()

    def matrix(self, outputs: bool = True) -> tuple[int, ...]:
        """The shape of the tensor as matrix or matrices; rows are outputs in embeddings too, or
        not.
        """
        return self.layout(outputs).matrix

    def outputs_by_inputs(self) -> Tensor:
        """The tensor as a matrix whose rows are outputs."""
        return self.layout(True).to_matrix(self.weight)

    def layout(self, outputs: bool) -> Layout:
        """How the tensor is read as a matrix."""
        options = LayoutOptions(conv_layout="out_as_h", rows_are_outputs=outputs)
        return layout_of(self.module, self.tensor, self.weight.shape, options)

    def take(self, suffix: str) -> Tensor:
        """The tensor of that name; raises a `ValueError` where the file has none."""
        if suffix not in self.tensors:
            raise ValueError(f"{suffix} is missing")
        return self.tensors[suffix]

    def expect(self, suffix: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Raise a `ValueError` if a tensor has another shape."""
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{suffix} is {tuple(tensor.shape)}, expected {tuple(shape)}")


@dataclass
class Read:
    """What becomes of one tensor of a network.

    Args:
        layer: where it stands.
        method: of gift.
        settings: of the method.
        values: by the method's names.
        claimed: the module whose cap takes it; None where a parameter cap does.
    """

    layer: Layer
    method: str
    settings: dict[str, Any]
    values: Tensors
    claimed: str | None

    @property
    def name(self) -> str:
        """The dotted name of the tensor."""
        return joined(self.layer.path, self.layer.tensor)

    @property
    def options(self) -> dict[str, Any]:
        """The settings as an action takes them: outputs of a convolution are rows."""
        is_convolution = self.layer.kind in CONVOLUTIONS
        return self.settings | ({"conv_layout": "out_as_h"} if is_convolution else {})


@dataclass(frozen=True)
class Form:
    """One `peft_type`.

    Args:
        peft_type: its name in a file.
        methods: the methods of gift that it stands for.
        kinds: the layers that it adapts.
        suffixes: the ends of the keys of its tensors.
        write: from the adapted tensors, what goes into a file.
        read: from a layer in a file, the configuration and shared tensors, what it becomes; raises
            a `ValueError` if it has no counterpart.
        options: those of the configuration that it understands, or that have no effect on outputs.
        bias: what a configuration calls the biases of the adapted layers, "" if it cannot.
        defaults: of options, where a configuration does not say.
    """

    peft_type: str
    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    suffixes: tuple[str, ...]
    write: Callable[[list[Place]], Written]
    read: Callable[[Layer, Config, Tensors], list[Read]]
    options: frozenset[str]
    bias: str = ""
    defaults: Config = field(default_factory=dict)


def common(values: list[Any]) -> Any:
    """The most frequent value, the first of those that are."""
    return Counter(values).most_common(1)[0][0]


def sizes(found: Mapping[str, tuple[int, float]], alpha_name: str) -> Config:
    """Ranks and alphas: the most frequent ones as default, patterns for the rest.

    Args:
        found: rank and alpha by dotted names.
        alpha_name: what the configuration calls alpha.
    """
    rank = common([rank for rank, _ in found.values()])
    alpha = common([alpha for _, alpha in found.values()])
    return {
        "r": rank,
        alpha_name: alpha,
        "rank_pattern": {exact_pattern(n): r for n, (r, _) in found.items() if r != rank},
        "alpha_pattern": {exact_pattern(n): a for n, (_, a) in found.items() if a != alpha},
    }


def size_of_layer(config: Config, name: str, alpha_name: str) -> tuple[Any, Any]:
    """Rank and alpha of a layer, as a configuration says."""
    rank = by_pattern(config.get("rank_pattern"), name, config.get("r"))
    return rank, by_pattern(config.get("alpha_pattern"), name, config.get(alpha_name))


def same(what: str, values: list[Any], written: Written) -> Any:
    """The one value that all layers have; PEFT has no other for some of them."""
    if len(set(values)) > 1:
        written.problems.append(
            f"{what} is one for all layers in PEFT, here there are {sorted(set(values), key=str)}"
        )
    return values[0]


def dropout_of(places: list[Place]) -> float:
    """The dropout that all share, 0 where they differ: it has no effect on outputs."""
    found = {place.adapter.method.dropout for place in places}
    return found.pop() if len(found) == 1 else 0.0


def plain(number: float) -> float | int:
    """An integer where it is one, for a file that people read."""
    return int(number) if number == int(number) else number
