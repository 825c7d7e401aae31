"""The layer types of the matrix: one row each.

A row makes the layer and its inputs, and says by explicit indices which element of a weight is
which element of a matrix. That is written here a second time, on purpose: the tests compare it with
`gift.layers`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gift.factories import mc_layer, pa_adapt, pc_ndim

Matrices = list[np.ndarray]


def flat(weight: np.ndarray, rows: int) -> Matrices:
    """One matrix of that many rows, elements in memory order."""
    return [weight.reshape(rows, -1)]


def first_axis(weight: np.ndarray, layer: Any) -> Matrices:
    return flat(weight, weight.shape[0])


def balanced_conv(weight: np.ndarray, layer: Any) -> Matrices:
    """`(o, i, k1 ... kn)`: the first n // 2 kernel axes go to the rows, for each group."""
    kernel = weight.shape[2:]
    rows = math.prod(kernel[: len(kernel) // 2])
    per_group = np.split(weight, layer.groups)
    return [group.reshape(group.shape[0] * rows, -1) for group in per_group]


def balanced_transposed_conv(weight: np.ndarray, layer: Any) -> Matrices:
    """`(i, o / g, ...)`: the same after swapping the first two axes within each group."""
    kernel = weight.shape[2:]
    rows = math.prod(kernel[: len(kernel) // 2])
    per_group = [group.swapaxes(0, 1) for group in np.split(weight, layer.groups)]
    return [group.reshape(group.shape[0] * rows, -1) for group in per_group]


def whole_filters(weight: np.ndarray, layer: Any) -> Matrices:
    """`(o, i, k1 ... kn)`: an output channel for each row, for each group."""
    return [group.reshape(group.shape[0], -1) for group in np.split(weight, layer.groups)]


def whole_transposed_filters(weight: np.ndarray, layer: Any) -> Matrices:
    """`(i, o / g, ...)`: the same after swapping the first two axes within each group."""
    per_group = [group.swapaxes(0, 1) for group in np.split(weight, layer.groups)]
    return [group.reshape(group.shape[0], -1) for group in per_group]


def transposed(weight: np.ndarray, layer: Any) -> Matrices:
    return [weight.T]


def experts(weight: np.ndarray, layer: Any) -> Matrices:
    return list(weight)


def column(weight: np.ndarray, layer: Any) -> Matrices:
    return [weight.reshape(-1, 1)]


@dataclass(frozen=True)
class LayerCase:
    """One layer type.

    Args:
        make: the layer.
        inputs: arguments for its forward.
        matrices: a weight as matrices, one for each group.
        filters: the same for methods to which a convolution's filter is one row.
        outputs: the same for methods to which an output feature is one row, in embeddings too.
        weights: names of its weights.
        output: from what the forward gives, the tensor that is compared.
        biases: names of its biases, each with the weights to whose outputs its parts are added;
            None means the weights' names with "bias" in the place of "weight".
        caps: caps for a layer that no module check knows.
        differs: properties that do not hold for the layer, each with its reason.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    matrices: Callable[[np.ndarray, Any], Matrices] = first_axis
    filters: Callable[[np.ndarray, Any], Matrices] | None = None
    outputs: Callable[[np.ndarray, Any], Matrices] | None = None
    weights: tuple[str, ...] = ("weight",)
    output: Callable[[Any], Tensor] = lambda result: result
    biases: dict[str, list[str]] | None = None
    caps: dict[str, Any] | None = None
    differs: dict[str, str] = field(default_factory=dict)

    def all_biases(self, net: nn.Module) -> dict[str, list[str]]:
        """Biases, and the weights that they belong to."""
        if self.caps is not None:
            return {}
        paired = {name.replace("weight", "bias"): [name] for name in self.weights}
        known = {name for name, _ in net.named_parameters()}
        return {b: w for b, w in (self.biases or paired).items() if b in known}

    def view(self, kind: str) -> Callable[[np.ndarray, Any], Matrices]:
        """How a method of that kind sees the weights."""
        filters = self.filters or _FILTERS.get(self.matrices, self.matrices)
        outputs = self.outputs or filters
        return {"matrices": self.matrices, "filters": filters, "outputs": outputs}[kind]


_FILTERS = {balanced_conv: whole_filters, balanced_transposed_conv: whole_transposed_filters}


def randn(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


def tokens(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, 11, shape),)


def first(result: Any) -> Tensor:
    return result[0]


class Experts(nn.Module):
    """Three-axis expert weights, a matrix and a vector, all raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.experts)


class Raw(nn.Module):
    """A raw matrix at the root of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.kernel)


class Scaled(nn.Linear):
    """A subclass whose own forward uses its weight in another way."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        return nn.functional.linear(input, weight, self.bias)


class Vector(nn.Module):
    """A raw vector."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def attention_inputs(kdim: int = 8, vdim: int = 8) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    return lambda: (torch.randn(2, 5, 8), torch.randn(2, 7, kdim), torch.randn(2, 7, vdim))


def with_hidden_state() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4), torch.randn(2, 6)


def packed() -> tuple[Any]:
    return (pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 3, 2])),)


def standardised_conv() -> nn.Module:
    from timm.layers import ScaledStdConv2d

    return ScaledStdConv2d(4, 6, 3, stride=2)


def conv1d_of_transformers(outputs: int = 5) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, 6)


RAW = {"para_caps": [(pc_ndim(at_least=1), pa_adapt)]}
# Properties that a plain torch layer lacks as well.
PICKLE = {"pickle": "torch pickles no parametrized module, adapted or not"}
WRITTEN = {"written": "tanh keeps its output, which nobody may write into, adapted or not"}
torch_nn = nn.utils
norms = nn.utils.parametrizations

LSTM_WEIGHTS = tuple(
    f"weight_{kind}_l{layer}{side}"
    for layer in (0, 1)
    for side in ("", "_reverse")
    for kind in ("ih", "hh", "hr")
)

LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(6, 5), randn(3, 6)),
    "linear_3d_input": LayerCase(lambda: nn.Linear(6, 5, bias=False), randn(2, 3, 6)),
    "linear_subclass": LayerCase(lambda: Scaled(6, 5), randn(3, 6)),
    "transformers_conv1d": LayerCase(conv1d_of_transformers, randn(2, 3, 6), transposed),
    "transformers_conv1d_square": LayerCase(
        lambda: conv1d_of_transformers(6), randn(2, 3, 6), transposed
    ),
    "conv1d": LayerCase(lambda: nn.Conv1d(4, 6, 3, padding=1), randn(2, 4, 9), balanced_conv),
    "conv1d_grouped_dilated_same": LayerCase(
        lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding="same"),
        randn(2, 4, 9),
        balanced_conv,
    ),
    "conv2d": LayerCase(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2), randn(2, 4, 8, 8), balanced_conv
    ),
    "conv2d_grouped": LayerCase(
        lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), randn(2, 4, 8, 8), balanced_conv
    ),
    "conv2d_depthwise": LayerCase(
        lambda: nn.Conv2d(4, 4, 3, groups=4), randn(2, 4, 6, 6), balanced_conv
    ),
    "conv2d_circular": LayerCase(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        randn(2, 4, 6, 6),
        balanced_conv,
    ),
    "conv2d_reflect": LayerCase(
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        randn(2, 4, 6, 6),
        balanced_conv,
    ),
    "conv2d_replicate": LayerCase(
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"),
        randn(2, 4, 6, 6),
        balanced_conv,
    ),
    "conv3d": LayerCase(lambda: nn.Conv3d(2, 4, (2, 2, 3)), randn(2, 2, 4, 4, 4), balanced_conv),
    "timm_standardised_conv": LayerCase(standardised_conv, randn(2, 4, 7, 7), balanced_conv),
    "conv_transpose1d": LayerCase(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
        randn(2, 4, 6),
        balanced_transposed_conv,
    ),
    "conv_transpose2d": LayerCase(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        randn(2, 4, 5, 5),
        balanced_transposed_conv,
    ),
    "conv_transpose3d": LayerCase(
        lambda: nn.ConvTranspose3d(2, 3, 2), randn(2, 2, 3, 3, 3), balanced_transposed_conv
    ),
    "embedding": LayerCase(
        lambda: nn.Embedding(11, 6, padding_idx=0), tokens(3, 4), outputs=transposed
    ),
    "embedding_max_norm": LayerCase(
        lambda: nn.Embedding(11, 6, max_norm=1.0), tokens(3, 4), outputs=transposed
    ),
    "embedding_sparse": LayerCase(
        lambda: nn.Embedding(11, 6, sparse=True), tokens(3, 4), outputs=transposed
    ),
    "embedding_bag": LayerCase(
        lambda: nn.EmbeddingBag(11, 6, mode="mean"), tokens(3, 4), outputs=transposed
    ),
    "embedding_bag_sparse": LayerCase(
        lambda: nn.EmbeddingBag(11, 6, mode="sum", sparse=True), tokens(3, 4), outputs=transposed
    ),
    "bilinear": LayerCase(
        lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4))
    ),
    "rnn": LayerCase(
        lambda: nn.RNN(4, 6),
        randn(5, 2, 4),
        weights=("weight_ih_l0", "weight_hh_l0"),
        output=first,
    ),
    "gru": LayerCase(
        lambda: nn.GRU(4, 6, batch_first=True),
        randn(2, 5, 4),
        weights=("weight_ih_l0", "weight_hh_l0"),
        output=first,
    ),
    "lstm_bidirectional_projected": LayerCase(
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3),
        randn(5, 2, 4),
        weights=LSTM_WEIGHTS,
        output=first,
    ),
    "lstm_packed": LayerCase(
        lambda: nn.LSTM(4, 6),
        packed,
        weights=("weight_ih_l0", "weight_hh_l0"),
        output=lambda result: result[0].data,
    ),
    "rnn_cell": LayerCase(
        lambda: nn.RNNCell(4, 6),
        with_hidden_state,
        weights=("weight_ih", "weight_hh"),
        differs=WRITTEN,
    ),
    "gru_cell": LayerCase(
        lambda: nn.GRUCell(4, 6), with_hidden_state, weights=("weight_ih", "weight_hh")
    ),
    "lstm_cell": LayerCase(
        lambda: nn.LSTMCell(4, 6),
        lambda: (torch.randn(2, 4), (torch.randn(2, 6), torch.randn(2, 6))),
        weights=("weight_ih", "weight_hh"),
        output=first,
    ),
    "attention": LayerCase(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        attention_inputs(),
        weights=("in_proj_weight", "out_proj.weight"),
        output=first,
    ),
    "attention_other_kdim_vdim": LayerCase(
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True),
        attention_inputs(4, 6),
        weights=("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
        biases={
            "in_proj_bias": ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
            "out_proj.bias": ["out_proj.weight"],
        },
        output=first,
    ),
    "weight_norm": LayerCase(
        lambda: norms.weight_norm(nn.Linear(6, 5)), randn(3, 6), differs=PICKLE
    ),
    "weight_norm_by_hook": LayerCase(lambda: torch_nn.weight_norm(nn.Linear(6, 5)), randn(3, 6)),
    "orthogonal": LayerCase(
        lambda: norms.orthogonal(nn.Linear(6, 5)),
        randn(3, 6),
        differs=PICKLE | {"bfloat16": "torch cannot orthogonalise a bfloat16 weight"},
    ),
    "spectral_norm": LayerCase(
        lambda: norms.spectral_norm(nn.Linear(6, 5)).eval(),
        randn(3, 6),
        differs=PICKLE | {"train": "each reading in training mode is a power iteration"},
    ),
    "raw_matrix_of_the_root": LayerCase(
        Raw, randn(3, 4), weights=("kernel",), caps=RAW, differs=WRITTEN
    ),
    "raw_expert_weights": LayerCase(Experts, randn(3, 4), experts, weights=("experts",), caps=RAW),
    "raw_vector": LayerCase(Vector, randn(3, 6), column, weights=("gain",), caps=RAW),
    "norm_weight": LayerCase(lambda: nn.LayerNorm(6, bias=False), randn(3, 6), column, caps=RAW),
}

ANY_LAYER = mc_layer()
