"""How one `peft_type` maps to gift: `Form`, which the modules next to this one create."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.weights.frozen import plain_tensor
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.interop.peft.names import by_pattern, exact_pattern
from gift.layers.layouts import Layout, LayoutOptions
from gift.layers.table import layout_of
from gift.quantization import dequantised

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass
class Written:
    """A fine-tuned network in PEFT's terms.

    Args:
        config: entries of the config that are specific to the form.
        tensors: tensors by their keys after the common prefix.
        shared: tensors by their full keys.
        targets: modules that PEFT will wrap.
        parameters: single parameters that PEFT will wrap.
        problems: reasons why it cannot be written.
    """

    config: Config = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of a layer."""
        self.targets.add(path)
        self.tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in tensors.items()}


@dataclass(frozen=True)
class Layer:
    """The content of a file for one layer of a network.

    Args:
        network: the base.
        path: path of the layer, or of the module that holds the parameter.
        module: the layer.
        tensors: tensors by the ends of their keys.
        tensor: name of the adapted tensor.
        single: whether PEFT adapts only that tensor, not the layer.
    """

    network: nn.Module
    path: str
    module: Any
    tensors: Tensors
    tensor: str = "weight"
    single: bool = False

    @property
    def kind(self) -> str:
        """The kind of layer."""
        return kind_of(self.module)

    @property
    def weight(self) -> Tensor:
        """The tensor of the base."""
        return dequantised(plain_tensor(self.module, self.tensor), self.module).detach()

    def matrix(self, outputs: bool = True) -> tuple[int, ...]:
        """Return the shape of the tensor as matrix or matrices.

        Args:
            outputs: whether rows are outputs in embeddings as well.
        """
        return self.layout(outputs).matrix

    def outputs_by_inputs(self) -> Tensor:
        """Return the tensor as a matrix whose rows are outputs."""
        return self.layout(True).to_matrix(self.weight)

    def layout(self, outputs: bool) -> Layout:
        """Return the layout that reads the tensor as a matrix."""
        options = LayoutOptions(conv_layout="out_as_h", rows_are_outputs=outputs)
        return layout_of(self.module, self.tensor, self.weight.shape, options)

    def take(self, suffix: str) -> Tensor:
        """Return the tensor of that name; raises a `ValueError` if the file has none."""
        if suffix not in self.tensors:
            raise ValueError(f"{suffix} is missing")
        return self.tensors[suffix]

    def expect(self, suffix: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Raise a `ValueError` if a tensor has another shape."""
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{suffix} is {tuple(tensor.shape)}, expected {tuple(shape)}")


@dataclass
class Read:
    """The delta of one tensor of a network.

    Args:
        layer: layer of the tensor.
        method: method of gift.
        settings: settings of the method.
        values: values by the method's names.
        claimed: the module whose cap takes it; None if a parameter cap does.
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
        """The settings for an action: outputs of a convolution are rows."""
        is_convolution = self.layer.kind in CONVOLUTIONS
        return self.settings | ({"conv_layout": "out_as_h"} if is_convolution else {})


@dataclass(frozen=True)
class Form:
    """One `peft_type`.

    Args:
        peft_type: name in a config.
        methods: corresponding methods of gift.
        kinds: layers that it adapts.
        suffixes: ends of the keys of its tensors.
        write: converts adapted tensors to the content of a file.
        read: converts a layer in a file, the config and shared tensors to deltas; raises a
            `ValueError` if there is no counterpart.
        options: options of the config that it supports, or that have no effect on outputs.
        shared: full keys of tensors that all layers share.
        bias: word in a config for the biases of the adapted layers, "" if there is none.
        defaults: values of options that are missing in a config.
        ties: whether PEFT adapts a tied tensor under all of its names if a file has one of them.
        indices: ends of the keys of tensors of integers.
        needs: options of the config without which a file does not have all that is needed.
    """

    peft_type: str
    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    suffixes: tuple[str, ...]
    write: Callable[[list[AdaptedTensor]], Written]
    read: Callable[[Layer, Config, Tensors], list[Read]]
    options: frozenset[str]
    bias: str = ""
    shared: frozenset[str] = frozenset()
    defaults: Config = field(default_factory=dict)
    ties: bool = False
    indices: frozenset[str] = frozenset()
    needs: Config = field(default_factory=dict)


def common(values: list[Any]) -> Any:
    """Return the most frequent value, or the first of them."""
    return Counter(values).most_common(1)[0][0]


def sizes(found: Mapping[str, tuple[int, float]], alpha_name: str) -> Config:
    """Return ranks and alphas: the most frequent ones as defaults, patterns for the rest.

    Args:
        found: rank and alpha by dotted names.
        alpha_name: name of alpha in the config.
    """
    ranks = {name: rank for name, (rank, _) in found.items()}
    alphas = {name: alpha for name, (_, alpha) in found.items()}
    return by_layer("r", "rank_pattern", ranks) | by_layer(alpha_name, "alpha_pattern", alphas)


def by_layer(option: str, patterns: str, found: Mapping[str, Any]) -> Config:
    """Return the most frequent value as an option, and patterns for the layers with another one.

    Args:
        option: name of the option in the config.
        patterns: name of the option that holds the patterns.
        found: values by dotted names.
    """
    most = common(list(found.values()))
    others = {exact_pattern(name): value for name, value in found.items() if value != most}
    return {option: most, patterns: others}


def size_of_layer(config: Config, name: str, alpha_name: str) -> tuple[Any, Any]:
    """Return the rank and alpha of a layer according to a config."""
    rank = by_pattern(config.get("rank_pattern"), name, config.get("r"))
    return rank, by_pattern(config.get("alpha_pattern"), name, config.get(alpha_name))


def same(what: str, values: list[Any], written: Written) -> Any:
    """Return the value that all layers share; if they differ, add a problem: PEFT has only one."""
    if len(set(values)) > 1:
        written.problems.append(
            f"{what} is one for all layers in PEFT, here there are {sorted(set(values), key=str)}"
        )
    return values[0]


def dropout_of(items: list[AdaptedTensor]) -> float:
    """Return the common dropout, or 0 if they differ, since it does not affect outputs."""
    found = {item.delta.method.dropout for item in items}
    return found.pop() if len(found) == 1 else 0.0


def plain(number: float) -> float | int:
    """Convert whole numbers to integers, for readable files."""
    return int(number) if number == int(number) else number
