"""Strategies that train parts of a network as they are: biases, norm layers, chosen modules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gift import GiftWarning, disable_fine_tuning, enable_fine_tuning, merge_strategies
from gift.factories import mc_norm
from gift.strategies import (
    BitFitFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    ModulesFineTuningStrategy,
    NormFineTuningStrategy,
)
from tests.common import all_bits, full_state, trainable

BitFit, Norm, Modules = BitFitFineTuningStrategy, NormFineTuningStrategy, ModulesFineTuningStrategy


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16))  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24))  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))  # fmt: skip


# --- as plain torch ----------------------------------------------------------------------------


class Many(nn.Module):
    """Layers whose biases have many names, and norm layers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch = nn.BatchNorm2d(8)
        self.group = nn.GroupNorm(2, 8)
        self.rnn = nn.LSTM(8, 8, num_layers=2)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.rms = nn.RMSNorm(8)
        self.layer = nn.LayerNorm(8)
        self.q_bias = nn.Parameter(torch.zeros(8))
        self.relative_position_bias_table = nn.Parameter(torch.ones(5, 2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.batch(self.conv(x))).flatten(2).permute(2, 0, 1)
        x = self.rnn(x)[0] + self.q_bias * self.relative_position_bias_table.sum()
        x = self.layer(self.rms(self.attention(x, x, x)[0]))
        return self.head(x)


BIASES = [
    "q_bias", "conv.bias", "batch.bias", "group.bias",
    *(f"rnn.bias_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")),
    "attention.in_proj_bias", "attention.out_proj.bias", "layer.bias", "head.bias",
]  # fmt: skip
NORMS = ["batch.weight", "batch.bias", "group.weight", "group.bias", "rms.weight",
         "layer.weight", "layer.bias"]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "chosen"),
    [
        (BitFit(), BIASES),
        (Norm(), NORMS),
        (Modules("rnn", "head"), ["rnn.", "head."]),
        (merge_strategies([Modules("head"), BitFit()]), [*BIASES, "head.weight"]),
    ],
    ids=repr,
)
def test_training_is_that_of_plain_torch(strategy: Any, chosen: list[str]) -> None:
    """Two steps with weight decay, which would move whatever is in the optimizer."""
    net, x = Many(), torch.randn(4, 3, 5, 5)
    plain, start = copy.deepcopy(net), all_bits(net)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad = name.startswith(tuple(chosen))
    enable_fine_tuning(net, strategy)
    assert trainable(net) == trainable(plain) != []
    for one in (net, plain):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one.train()(x).square().sum().backward()
            optimizer.step()
    now = all_bits(net)
    assert now == all_bits(plain)
    moved = {name for name in now if now[name] != start[name]}
    statistics = {f"batch.{name}" for name in dict(net.batch.named_buffers())}
    assert moved == set(trainable(net)) | statistics
    assert set(net.state_dict()) == moved
    assert all_bits(disable_fine_tuning(net)) == start


# --- biases ------------------------------------------------------------------------------------


def test_bitfit_of_a_bert_by_hand() -> None:
    """With h hidden and m in the middle: seven biases in each layer, three of norms in all else."""
    net = bert()
    report = enable_fine_tuning(net, BitFit())
    h, m = 16, 24
    in_layers = 2 * (4 * h + m + h + 2 * h)  # q, k, v, o; the two of the feed-forward; two norms
    assert report.trainable_after == in_layers + h + h + 2  # a norm, the pooler, the head
    assert all(name.endswith("bias") for name in trainable(net))


def test_a_table_of_positions_is_no_bias() -> None:
    """T5's norms have no bias, and its relative bias is the weight of an embedding."""
    net = t5()
    assert any("relative_attention_bias.weight" in name for name, _ in net.named_parameters())
    before = full_state(net)
    with pytest.raises(ValueError, match=r"(?s)no cap of BitFitFine.* pc_bias\(\) -> pa_train"):
        enable_fine_tuning(net, BitFit())
    assert full_state(net) == before
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24,
                             num_heads=(1, 2), num_classes=3)  # fmt: skip
    assert any("relative_position_bias_table" in name for name, _ in swin.named_parameters())
    enable_fine_tuning(swin, BitFit())
    named = {name for name, _ in swin.named_parameters() if name.endswith(".bias")}
    assert set(trainable(swin)) == named


def test_biases_that_stand_apart_are_found() -> None:
    """In timm's BEiT, query and value have biases of their own on the attention module."""
    net = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=24, num_heads=2)
    enable_fine_tuning(net, BitFit())
    assert {"blocks.0.attn.q_bias", "blocks.1.attn.v_bias", "head.bias"} <= {*trainable(net)}
    assert trainable(net) == [n for n, _ in net.named_parameters() if n.endswith("bias")]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_what_a_bias_is_computed_from_is_trained() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
    torch.nn.utils.prune.l1_unstructured(net[0], "bias", 2)
    torch.nn.utils.prune.l1_unstructured(net[0], "weight", 2)
    register_parametrization(net[1], "bias", Scaled())
    register_parametrization(net[1], "weight", Scaled())
    register_parametrization(net[2], "bias_hh_l0", Scaled())
    enable_fine_tuning(net, BitFit())
    assert sorted(trainable(net)) == [
        "0.bias_orig",
        "1.parametrizations.bias.original",
        "2.bias_ih_l0",
        "2.parametrizations.bias_hh_l0.original",
    ]


def test_bitfit_and_a_new_head() -> None:
    net = resnet18(num_classes=10)
    enable_fine_tuning(net, merge_strategies([HeadReplacementStrategy(4), BitFit()]))
    norms = [f"{name}.bias" for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(trainable(net)) == sorted([*norms, "fc.weight", "fc.bias"])


def test_layers_of_another_method_are_its_own() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    enable_fine_tuning(net, merge_strategies([LoRALinearFineTuningStrategy(1), BitFit()]))
    assert trainable(net) == ["0.lora_B", "0.lora_A", "1.bias"]


# --- norm layers -------------------------------------------------------------------------------


class AbnormalScale(nn.Module):
    """Norms by name only: one has no norm in it, one a matrix, one a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class NormalisedLinear(nn.Linear):
    pass


class AdaNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)


class MyNorm1d(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    ("module", "is_norm"),
    [
        (nn.BatchNorm1d(4), True), (nn.SyncBatchNorm(4), True), (nn.InstanceNorm3d(4), True),
        (nn.LazyBatchNorm2d(), True), (nn.LayerNorm((4, 3)), True), (nn.GroupNorm(2, 4), True),
        (nn.RMSNorm(4), True), (FrozenBatchNorm2d(4), True), (MyNorm1d(4), True),
        (MyNorm1d(1, 4, 1, 1), True), (MyNorm1d(), True), (timm.layers.RmsNorm(4), True),
        (timm.layers.LayerNorm2d(4), True), (timm.layers.BatchNormAct2d(4), True),
        (timm.layers.EvoNorm2dB0(4), True), (timm.layers.SimpleNorm(4), True),
        (MyNorm1d(4, 4), False), (AbnormalScale(), False), (NormalisedLinear(4, 4), False),
        (AdaNorm(), False), (nn.Linear(4, 4), False), (nn.PReLU(4), False),
        (timm.layers.LayerScale(4), False), (nn.Sequential(nn.LayerNorm(4)), False),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_norm_layers_are_known_by_type_or_by_their_looks(module: nn.Module, is_norm: bool) -> None:
    assert mc_norm()(None, "", "", type(module).__name__, module) is is_norm


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: resnet18(num_classes=4), 9_600),
        (bert, (1 + 2 * 2) * 2 * 16),
        (llama, (1 + 2 * 2) * 16),
        (t5, (2 + 2 * 2 + 2 * 3) * 16),
        (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
         2 * (8 + 8 + 8 + 16 + 16) + 2 * (8 + 8 + 16) + 2 * 16),
    ],
    ids=["resnet", "bert", "llama", "t5", "convnext"],
)  # fmt: skip
def test_norm_layers_of_real_networks_by_hand(make: Callable[[], Any], count: int) -> None:
    net = make()
    report = enable_fine_tuning(net, Norm())
    assert report.trainable_after == count
    holders = {net.get_submodule(name.rpartition(".")[0]) for name in trainable(net)}
    assert all("Norm" in type(module).__name__ for module in holders)


@pytest.mark.parametrize("statistics", [True, False])
def test_statistics_move_unless_they_shall_not(statistics: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    start, x = all_bits(net), torch.randn(2, 3, 5, 5)
    enable_fine_tuning(net, Norm(statistics=statistics))
    assert trainable(net) == ["1.weight", "1.bias"]
    net.train()(x).sum().backward()
    moved = {name for name, value in all_bits(net).items() if value != start[name]}
    assert bool(moved) is statistics
    assert [m.training for m in net[1:]] == [statistics] * 2
    if statistics:
        assert moved == {f"{n}.{name}" for n in "12" for name, _ in net[1].named_buffers()}
    disable_fine_tuning(net)
    assert all(m.training for m in net)


def test_an_activation_inside_a_norm_layer_is_frozen() -> None:
    net = nn.Sequential(timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU), nn.Linear(4, 4))
    enable_fine_tuning(net, Norm())
    assert trainable(net) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (nn.Linear(4, 4), r"no cap of NormFineTuningStrategy matched anything.*mc_norm\(\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)),
         "norm layers of this network have no weight or bias"),
    ],
)  # fmt: skip
def test_a_network_without_norm_parameters_is_refused(net: nn.Module, reason: str) -> None:
    before = full_state(net)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        enable_fine_tuning(net, Norm())
    assert full_state(net) == before


def test_norms_beside_lora() -> None:
    net = resnet18(num_classes=10)
    lora = LoRAAllFineTuningStrategy(rank=1)
    enable_fine_tuning(net, merge_strategies([lora, Norm()]))
    assert len(trainable(net)) == 2 * 21 + 2 * 20


# --- chosen modules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "prefixes"),
    [
        (["fc"], ["fc."]),
        (["fc", "layer4.*"], ["fc.", "layer4."]),
        (["layer?.1.bn2", "conv1"], ["conv1.", *(f"layer{n}.1.bn2." for n in range(1, 5))]),
        ([""], [""]),
    ],
)
def test_modules_are_chosen_by_paths_and_patterns(paths: list[str], prefixes: list[str]) -> None:
    with torch.device("meta"):
        net = resnet18(num_classes=10)
    expected = [n for n, _ in net.named_parameters() if n.startswith(tuple(prefixes))]
    enable_fine_tuning(net, Modules(*paths))
    assert trainable(net) == expected


def test_each_path_that_takes_nothing_is_reported() -> None:
    net = bert()
    before = full_state(net)
    with pytest.raises(ValueError, match=r"(?s)no cap of Modules.*'fc'.*'layer4.\*'"):
        enable_fine_tuning(net, Modules("fc", "layer4.*"))
    assert full_state(net) == before
    with pytest.warns(GiftWarning, match=r"glob='clasifier'.*took nothing; closest.*classifier"):
        report = enable_fine_tuning(net, Modules("classifier", "clasifier"))
    assert len(report.unmatched) == 1
    assert trainable(net) == ["classifier.weight", "classifier.bias"]


def test_paths_are_checked_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="no path is given"):
        Modules()
    with pytest.raises(TypeError, match="expected names"):
        Modules("fc", 3)  # type: ignore[arg-type]
