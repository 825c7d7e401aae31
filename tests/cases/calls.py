"""Modules whose call can be wrapped, and bottleneck adapters written again for them.

The formula is one of tensor products along an axis, differentiated by autograd; in a plain network
it stands in a forward hook.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from gift import enable_fine_tuning
from gift.strategies import BottleneckFineTuningStrategy

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "tanh": lambda x: 2 * torch.sigmoid(2 * x) - 1,
    "identity": lambda x: x,
}


def adapter(z: Tensor, p: dict[str, Tensor], act: str, axis: int) -> Tensor:
    """``W_up act(W_down z + b_down) + b_up`` along an axis."""

    def product(weight: Tensor, bias: Tensor, x: Tensor, along: int) -> Tensor:
        result = torch.tensordot(weight, x, dims=([1], [along]))
        return result + bias.reshape(-1, *[1] * (result.ndim - 1))

    hidden = ACTS[act](product(p["down_weight"], p["down_bias"], z, axis))
    return product(p["up_weight"], p["up_bias"], hidden, 0).movedim(0, axis)


def items(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, Pair):
        return [("x", output.x)]
    return list(output.items() if isinstance(output, dict) else enumerate(output))


def first(output: Any) -> Tensor:
    """The tensor that is changed."""
    if isinstance(output, PackedSequence):
        return output.data
    if isinstance(output, Tensor):
        return output
    return next(first(item) for _, item in items(output) if item is not None)


def put(output: Any, new: Tensor) -> Any:
    """`output` with `new` in that place."""
    if isinstance(output, PackedSequence):
        return PackedSequence(new, *output[1:])
    if isinstance(output, Tensor):
        return new
    key, item = next((key, item) for key, item in items(output) if item is not None)
    if isinstance(output, Pair):
        return replace(output, x=new)
    if isinstance(output, dict):
        return type(output)({**output, key: put(item, new)})
    return type(output)([*output[:key], put(item, new), *output[key + 1 :]])


def hooked(
    net: nn.Module, path: str, p: dict[str, Tensor], act: str, scaling: float, parallel: bool,
    axis: int,
) -> None:  # fmt: skip
    """Let a plain network have an adapter with the parameters `p`."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        f = first(output)
        z = first(args[0] if args else kwargs["query"]) if parallel else f
        return put(output, f + scaling * adapter(z, p, act, axis))

    net.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


@dataclass
class Pair:
    """An output of somebody's own."""

    x: Tensor
    label: str


class Gives(nn.Module):
    """Gives what it computes in a container."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(6, 5), wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(self.layer(x) * scale)


def as_mapping(y: Tensor) -> dict[str, Any]:
    return {"loss": None, "y": y, "z": y + 1}


def as_list(y: Tensor) -> list[Tensor]:
    return [y, y + 1]


def as_nested(y: Tensor) -> Any:
    return (y, "a"), y + 1


def as_pair(y: Tensor) -> Pair:
    return Pair(y, "a")


class Norm(nn.Module):
    """A norm as language models have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * self.weight


@dataclass(frozen=True)
class CallCase:
    """One kind of module.

    Args:
        make: a network.
        inputs: what it is called with.
        after: path of the module in it that is wrapped.
        axis: along which that has its features.
        alone: why it takes no parallel bottleneck, if so: the error says that.
        settings: of the bottleneck.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    after: str = ""
    axis: int = -1
    alone: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def randn(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


def ids(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, 20, shape),)


def packed() -> tuple[PackedSequence]:
    return (pack_padded_sequence(torch.randn(5, 3, 6), torch.tensor([5, 3, 2])),)


def bert() -> BertModel:
    return BertModel(BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        intermediate_size=12, max_position_embeddings=16))  # fmt: skip


def gpt2() -> GPT2Model:
    return GPT2Model(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2,
                                bos_token_id=0, eos_token_id=0))  # fmt: skip


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2)


def padded() -> tuple[Tensor, None, Tensor]:
    return torch.randn(2, 5, 8), None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def attended() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


SIZES = "differ in more than their channels"
LOOKS_UP = "input features are not known"

CASES: dict[str, CallCase] = {
    "linear": CallCase(lambda: nn.Linear(6, 5), randn(2, 3, 6)),
    "bilinear": CallCase(lambda: nn.Bilinear(6, 4, 5), lambda: (torch.randn(3, 6),
                                                                torch.randn(3, 4))),
    "transformers_conv1d": CallCase(lambda: Conv1D(5, 6), randn(2, 3, 6)),
    "conv1d": CallCase(lambda: nn.Conv1d(6, 5, 1), randn(2, 6, 8), axis=1),
    "conv2d": CallCase(lambda: nn.Conv2d(6, 5, 3, padding=1), randn(2, 6, 8, 7), axis=1),
    "conv2d_same": CallCase(
        lambda: nn.Conv2d(6, 5, 3, padding="same", dilation=2), randn(2, 6, 8, 8), axis=1),
    "conv2d_unbatched": CallCase(lambda: nn.Conv2d(6, 5, 1), randn(6, 8, 5), axis=0),
    "conv2d_strided": CallCase(
        lambda: nn.Conv2d(6, 5, 3, 2, 1), randn(2, 6, 8, 8), axis=1, alone=SIZES),
    "conv2d_valid": CallCase(
        lambda: nn.Conv2d(6, 5, 2, padding="valid"), randn(2, 6, 8, 8), axis=1, alone=SIZES),
    "conv3d": CallCase(lambda: nn.Conv3d(6, 5, 3, padding=1), randn(2, 6, 4, 4, 3), axis=1),
    "conv_transpose": CallCase(
        lambda: nn.ConvTranspose2d(6, 5, 3, padding=1), randn(2, 6, 8, 8), axis=1),
    "conv_transpose_strided": CallCase(
        lambda: nn.ConvTranspose2d(6, 5, 2, 2), randn(2, 6, 4, 4), axis=1, alone=SIZES),
    "batch_norm": CallCase(lambda: nn.BatchNorm2d(6), randn(2, 6, 4, 4), axis=1),
    "group_norm": CallCase(lambda: nn.GroupNorm(2, 6), randn(2, 6, 4), axis=1),
    "instance_norm": CallCase(lambda: nn.InstanceNorm1d(6), randn(2, 6, 4), axis=1),
    "layer_norm": CallCase(lambda: nn.LayerNorm(6), randn(2, 3, 6)),
    "own_norm": CallCase(Norm, randn(2, 3, 6)),
    "embedding": CallCase(lambda: nn.Embedding(20, 6), ids(2, 3), alone=LOOKS_UP),
    "embedding_bag": CallCase(lambda: nn.EmbeddingBag(20, 6), ids(2, 3), alone=LOOKS_UP),
    "lstm": CallCase(lambda: nn.LSTM(6, 5, bidirectional=True), randn(4, 2, 6)),
    "lstm_projected": CallCase(lambda: nn.LSTM(6, 5, proj_size=3), randn(4, 2, 6)),
    "gru_packed": CallCase(lambda: nn.GRU(6, 5), packed),
    "lstm_cell": CallCase(lambda: nn.LSTMCell(6, 5), randn(2, 6)),
    "attention": CallCase(lambda: nn.MultiheadAttention(8, 2, batch_first=True), attended),
    "own_mapping": CallCase(lambda: Gives(as_mapping), randn(2, 6)),
    "own_list": CallCase(lambda: Gives(as_list), randn(2, 6)),
    "own_nested": CallCase(lambda: Gives(as_nested), randn(2, 6)),
    "own_dataclass": CallCase(lambda: Gives(as_pair), randn(2, 6)),
    "told": CallCase(nn.Identity, randn(2, 6, 4), axis=1, settings={"dim": 6, "axis": 1}),
    "residual_block": CallCase(
        lambda: BasicBlock(6, 6).requires_grad_(True), randn(2, 6, 8, 8), axis=1),
    "timm_block": CallCase(
        lambda: timm.layers.Mlp(8, 12), randn(2, 5, 8)),
    "vision_block": CallCase(
        lambda: timm.models.vision_transformer.Block(8, 2, init_values=0.1), randn(2, 5, 8)),
    "convnext_block": CallCase(
        lambda: timm.models.convnext.ConvNeXtBlock(8), randn(2, 8, 6, 6), axis=1,
        settings={"axis": 1}),
    "encoder_layer": CallCase(encoder_layer, randn(2, 5, 8)),
    "encoder": CallCase(encoder, padded, "layers.0"),
    "attention_in_encoder": CallCase(encoder, padded, "layers.0.self_attn"),
    "linear_in_encoder": CallCase(encoder, padded, "layers.1.linear2"),
    "bert_layer": CallCase(bert, ids(2, 5), "encoder.layer.1"),
    "bert_attention": CallCase(bert, ids(2, 5), "encoder.layer.0.attention"),
    "gpt2_block": CallCase(gpt2, ids(2, 5), "h.0"),
    "gpt2_attention": CallCase(gpt2, ids(2, 5), "h.1.attn"),
}  # fmt: skip

KEYS = ["down_weight", "down_bias", "up_weight", "up_bias"]
every_module = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both_ways = pytest.mark.parametrize("parallel", [False, True], ids=["after", "beside"])


def wrapped(case: CallCase, net: nn.Module, **settings: Any) -> Any:
    """`net`, with a bottleneck of width 3 at the place of the case."""
    enable_fine_tuning(
        net, BottleneckFineTuningStrategy(3, after=case.after, **case.settings, **settings)
    )
    return net


def parameters(net: nn.Module, case: CallCase) -> dict[str, nn.Parameter]:
    module = net.get_submodule(case.after)
    return {key: getattr(module, f"bottleneck_{key}") for key in KEYS}


def fill(net: nn.Module) -> None:
    """As after some training: nothing is zero any more."""
    for parameter in net.parameters():
        parameter.data.normal_()


def tensors(output: Any) -> list[Tensor]:
    found = tree_leaves(vars(output) if hasattr(output, "label") else output)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def double(x: Any) -> Any:
    return x.double() if x is not None and first(x).is_floating_point() else x


def called(net: nn.Module, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(5)  # for dropout
    return net(*inputs)
