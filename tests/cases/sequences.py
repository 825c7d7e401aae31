"""Small random networks, what may fine-tune them, and what they must then compute.

Nothing here asks gift what it did: which tensors a plan adapts, how they are named, what the
effective weights are (`tests.cases.methods` on the matrices of `tests.cases.layers`, in float64)
and what a network computes with them are said again.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gift import FineTuningStrategy
from gift.factories import ma_adapt, ma_freeze, ma_replace_head, ma_train, mc_path
from tests.cases.layers import (
    balanced_conv,
    balanced_transposed_conv,
    first_axis,
    transposed,
    whole_filters,
    whole_transposed_filters,
)
from tests.cases.methods import METHODS, MethodCase

SIZE, TOKENS = 6, 11


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(SIZE, SIZE)
        self.two = nn.Linear(SIZE, SIZE)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Over(nn.Module):
    """A layer for images, over a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


class Attention(nn.MultiheadAttention):
    """Of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__(SIZE, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    """Its outputs alone."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


PIECES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "conv": lambda: Over(nn.Conv2d(SIZE, SIZE, (3, 1), padding=(1, 0), groups=2)),
    "transposed": lambda: Over(nn.ConvTranspose2d(SIZE, SIZE, (3, 1), padding=(1, 0))),
    "attention": Attention,
    "recurrent": Recurrent,
    "layer_norm": lambda: nn.LayerNorm(SIZE),
    "batch_norm": lambda: Over(nn.BatchNorm2d(SIZE)),
    "tied": Tied,
    "nested": lambda: nn.Sequential(nn.Linear(SIZE, 4), nn.Tanh(), nn.Linear(4, SIZE, bias=False)),
}


class Net(nn.Module):
    """An embedding, pieces that are added to what passes, and a head, which may be tied."""

    def __init__(self, pieces: Iterable[str], tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, SIZE)
        self.parts = nn.ModuleList(PIECES[name]() for name in pieces)
        self.head = nn.Linear(SIZE, TOKENS)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for part in self.parts:
            x = x + torch.tanh(part(x))
        return self.head(x)


NORMS = (nn.LayerNorm, nn.BatchNorm2d)
# The first class that fits says how a weight is a matrix: to all methods, to those that see whole
# filters, to those that see outputs.
VIEWS: dict[type, tuple[Any, Any, Any]] = {
    nn.ConvTranspose2d: (balanced_transposed_conv, *[whole_transposed_filters] * 2),
    nn.Conv2d: (balanced_conv, whole_filters, whole_filters),
    nn.Embedding: (first_axis, first_axis, transposed),
    nn.Linear: (first_axis, first_axis, first_axis),
    nn.MultiheadAttention: (first_axis, first_axis, first_axis),
    nn.LSTM: (first_axis, first_axis, first_axis),
}
KINDS = ("matrices", "filters", "outputs")

# What each method trains for a weight, and what it keeps as buffers that a state has.
ADDS: dict[str, tuple[list[str], list[str]]] = {
    "lora": (["lora_B", "lora_A"], []),
    "lora_scaled": (["lora_B", "lora_A"], []),
    "rslora": (["lora_B", "lora_A"], []),
    "dora": (["lora_B", "lora_A", "dora_delta_m"], []),
    "ia3_feedforward": (["ia3_l"], []),
    "svdiff": (["svdiff_delta"], []),
    "loha_scaled": (["loha_B1", "loha_A1", "loha_B2", "loha_A2"], []),
    "lokr": (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], []),
    "fourierft_few": (["fourierft_c"], []),
    "vera_small": (["vera_b", "vera_d"], []),
    "pissa": (["lora_B", "lora_A"], ["pissa_B0", "pissa_A0"]),
    "olora_scaled": (["lora_B", "lora_A"], ["olora_B0", "olora_A0"]),
    "lora_fa": (["lora_B"], ["lora_A"]),
    "oft": (["oft_Q"], []),
    "hra_pair": (["hra_u"], []),
}
LOW_RANK = {"lora", "lora_scaled", "rslora", "pissa", "olora_scaled", "lora_fa", "vera_small",
            "loha_scaled"}  # fmt: skip
NO_MULTIPLE = {"dora", "oft", "hra_pair", "svdiff"}
READS_WEIGHT = {"dora", "svdiff", "pissa", "olora_scaled"}


@dataclass(frozen=True)
class Shape:
    """A kind of network, and what is known of it.

    Args:
        pieces: their names.
        tied: whether the head has the weight of the embedding.
    """

    pieces: tuple[str, ...]
    tied: bool

    def make(self) -> Any:
        return Net(self.pieces, self.tied)

    @cached_property
    def plain(self) -> Any:
        """One such network in double precision, to compute with, and to look at."""
        return self.make().double()

    @cached_property
    def classes(self) -> dict[str, type]:
        return {path: type(module) for path, module in self.make().named_modules()}

    @cached_property
    def layers(self) -> list[list[str]]:
        """Paths of the layers that can be adapted; those with a tied weight are in one list."""
        found = {p: cls for p, cls in self.classes.items() if issubclass(cls, tuple(VIEWS))}
        inside = {p for p in found for q in found if p.startswith(f"{q}.")}  # of an attention
        groups: dict[str, list[str]] = {}
        for path in found:
            key = path.removesuffix("two") + "one" if path.endswith(".two") else path
            key = "embed" if self.tied and path == "head" else key
            if path not in inside:
                groups.setdefault(key, []).append(path)
        return list(groups.values())

    @cached_property
    def norms(self) -> list[str]:
        return [path for path, cls in self.classes.items() if issubclass(cls, NORMS)]

    @cached_property
    def names(self) -> dict[str, str]:
        """Each name of a parameter or buffer, and its first name."""
        own = self.make()
        named = [*own.named_parameters(remove_duplicate=False), *own.named_buffers()]
        first = {id(t): name for name, t in reversed(named)}
        return {name: first[id(tensor)] for name, tensor in named}

    @cached_property
    def buffers(self) -> list[str]:
        return [name for name, _ in self.make().named_buffers()]

    def weights(self, path: str) -> list[str]:
        """The names of the weights of a layer."""
        layer = self.make().get_submodule(path)
        own = [name for name, p in layer.named_parameters() if p.ndim > 1]
        return [f"{path}.{name}" for name in own]


@dataclass(frozen=True)
class Plan:
    """What a strategy does to a network of a shape.

    Args:
        shape: of the network.
        method: key of a row of `METHODS`; None if nothing is adapted.
        adapted: paths of the layers that are adapted.
        trained: paths of the layers that are trained as they are.
        head: the number of outputs of a new head; None if it stays.
        still: whether running statistics are frozen.
    """

    shape: Shape
    method: str | None
    adapted: tuple[str, ...]
    trained: tuple[str, ...]
    head: int | None
    still: bool

    @staticmethod
    def drawn(shape: Shape, chance: random.Random) -> "Plan":
        fates = [chance.choice("aaatf") for _ in shape.layers]
        adapted = [p for fate, paths in zip(fates, shape.layers, strict=True) for p in paths
                   if fate == "a"]  # fmt: skip
        trained = [p for fate, paths in zip(fates, shape.layers, strict=True) for p in paths
                   if fate == "t"]  # fmt: skip
        trained += [path for path in shape.norms if chance.random() < 0.3]
        head = chance.choice([None, None, 3, TOKENS])
        head = None if shape.tied or "head" in (*adapted, *trained) else head
        if not adapted and not trained and head is None:
            adapted = shape.layers[0]
        still = chance.random() < 0.3 and not {*shape.norms}.intersection(trained)
        method = chance.choice(list(ADDS)) if adapted else None
        return Plan(shape, method, tuple(adapted), tuple(trained), head, still)

    @property
    def case(self) -> MethodCase:
        assert self.method is not None
        return METHODS[self.method]

    def strategy(self) -> FineTuningStrategy:
        caps: list[Any] = []
        if self.adapted:
            action = ma_adapt(self.case.method, **self.case.settings)
            caps.append((mc_path(*self.adapted), action))
        if self.trained:
            caps.append((mc_path(*self.trained), ma_train()))
        if self.head is not None:
            caps.append((mc_path("head"), ma_replace_head(self.head)))
        if still := self.still_norms:
            caps.append((mc_path(*still), ma_freeze(statistics=True)))
        return FineTuningStrategy(caps)

    @property
    def still_norms(self) -> list[str]:
        """Paths of the layers whose running statistics are frozen."""
        found = [p for p in self.shape.norms if self.shape.classes[p] is nn.BatchNorm2d]
        return found if self.still else []

    @cached_property
    def tensors(self) -> dict[str, str]:
        """The adapted tensors by their first names, each with the path of its layer."""
        found: dict[str, str] = {}
        for path in self.adapted:
            for name in self.shape.weights(path):
                found.setdefault(self.shape.names[name], path)
        return found

    @cached_property
    def in_place(self) -> list[str]:
        """First names of the parameters that are trained as they are, and of all buffers."""
        paths = [*self.trained, *(["head"] if self.head is not None else [])]
        firsts = dict.fromkeys(
            first for name, first in self.shape.names.items()
            for path in paths if name.startswith(f"{path}.")
        )  # fmt: skip
        return list(dict.fromkeys([*firsts, *self.shape.buffers]))

    def added(self, tensor: str) -> dict[str, str]:
        """Names of what the method trains for a tensor, and keeps in buffers, by their roles."""
        path, _, own = tensor.rpartition(".")
        prefix = f"{path}." + ("" if own == "weight" else f"{own}_")
        return {role: prefix + role for roles in ADDS[str(self.method)] for role in roles}

    def trained_deltas(self) -> list[str]:
        own = ADDS[self.method][0] if self.method else []
        return [self.added(tensor)[role] for tensor in self.tensors for role in own]

    def saved_buffers(self) -> list[str]:
        own = ADDS[self.method][1] if self.method else []
        return [self.added(tensor)[role] for tensor in self.tensors for role in own]

    @property
    def chosen(self) -> list[str]:
        """First names of all that is trained."""
        buffers = set(self.shape.buffers)
        return [*(n for n in self.in_place if n not in buffers), *self.trained_deltas()]

    def effective(
        self, base: Mapping[str, Tensor], own: Mapping[str, Mapping[str, Tensor]], kind: str = ""
    ) -> dict[str, Tensor]:
        """The adapted weights by the formula, in float64.

        Args:
            base: the base, in float64, by first names.
            own: for each adapted tensor, what the method added, by its roles.
            kind: how weights are seen as matrices, if not as by the method.
        """
        made = {}
        for tensor, path in self.tensors.items():
            weight, layer = base[tensor], self.shape.plain.get_submodule(path)
            views = next(views for cls, views in VIEWS.items() if isinstance(layer, cls))
            view = views[KINDS.index(kind or self.case.view)]
            places = view(np.arange(weight.numel()).reshape(weight.shape), layer)
            result = weight.flatten()
            for number, place in enumerate(places):
                groups = len(places)
                mine = {k: v[number] if groups > 1 or v.ndim == 3 else v
                        for k, v in own[tensor].items()}  # fmt: skip
                where = torch.tensor(np.ascontiguousarray(place))
                value = self.case.formula(weight.flatten()[where], mine)
                result = result.index_put((where.flatten(),), value.flatten())
            made[tensor] = result.reshape(weight.shape)
        return made


def computed(
    shape: Shape, values: Mapping[str, Tensor], x: Tensor, training: Callable[[str], bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a plain network computes with these weights, and its buffers afterwards.

    Args:
        shape: of the network.
        values: in float64, by first names.
        x: the batch.
        training: from the path of a module, its mode.
    """
    plain = shape.plain
    for path, module in plain.named_modules():
        module.training = training(path)
    for name, first in shape.names.items():
        path, _, own = name.rpartition(".")
        module = plain.get_submodule(path)
        module._parameters.pop(own, None)
        value = values[first]
        setattr(module, own, value.detach().clone() if first in shape.buffers else value)
        if isinstance(module, nn.LSTM):
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
    output = plain(x)
    return output, {name: dict(plain.named_buffers())[name] for name in shape.buffers}
