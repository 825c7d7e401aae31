"""Failures seen in other libraries, each on real layers and networks: here they come out right."""

import copy
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from gift import (
    FineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    enable_fine_tuning,
    load_strategy_from_config,
    merge_strategies,
    plan_fine_tuning,
)
from gift.factories import (
    ma_adapt,
    ma_freeze,
    ma_train,
    mc_layer,
    mc_name,
    mc_type,
    pa_adapt,
    pa_train,
    pc_any,
    pc_name,
    pc_ndim,
)
from gift.strategies import (
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)
from gift.utils.network_tool import trainable_parameters
from tests.common import (
    all_bits,
    assert_same_training,
    enabled,
    full_state,
    merged,
    trainable,
)

LORA = LoRAAllFineTuningStrategy


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Float64 leaves no room for "nearly right"."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 8))


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
    )


def bert(**settings: Any) -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, **settings,
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def train(net: nn.Module, x: Tensor, steps: int = 3) -> None:
    """An unchanged loop."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


# --- copies ------------------------------------------------------------------------------------


def test_a_deep_copy_trains_its_own_delta() -> None:
    net, x = enabled(mlp()), torch.randn(4, 8)
    twin = copy.deepcopy(net)
    before = all_bits(net)
    train(twin, x)
    assert all_bits(net) == before
    changed = {name for name, value in all_bits(twin).items() if value != before[name]}
    assert changed == set(trainable(net))


@pytest.mark.parametrize("all_parameters", [False, True])
def test_an_exponential_moving_average_averages_the_deltas(all_parameters: bool) -> None:
    """By default it compares the parameters of a wrapper, all, with those of the network, so either
    the buffers must be averaged too, or ``parameters()`` must give all.
    """
    net, x = mlp(), torch.randn(4, 8)
    enable_fine_tuning(net, LORA(rank=2), replace_parameter_function=not all_parameters)
    train(net, x)
    average = AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=not all_parameters
    )
    base = {name: value for name, value in all_bits(net).items() if "lora" not in name}
    deltas = list(trainable_parameters(net))
    expected = [p.detach().clone() for p in deltas]
    average.update_parameters(net)  # the first update copies
    for _ in range(2):
        train(net, x, steps=1)
        average.update_parameters(net)
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, deltas, strict=True)]
    averaged = list(trainable_parameters(average.module))
    torch.testing.assert_close([p.detach() for p in averaged], expected)
    now = all_bits(average.module)
    assert {name: now[name] for name in base} == base
    with torch.no_grad():
        for parameter, value in zip(deltas, expected, strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(average(x), net(x))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_network_comes_back(how: str) -> None:
    net, x, file = enabled(small_cnn()), torch.randn(2, 3, 4, 4), io.BytesIO()
    (pickle.dump if how == "pickle" else torch.save)(net, file)
    file.seek(0)
    twin = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    before = all_bits(net)
    assert all_bits(twin) == before
    train(twin, x)
    assert all_bits(twin) != before
    assert all_bits(net) == before


# --- evaluation, training ----------------------------------------------------------------------


def test_the_best_delta_is_reloaded_into_a_network_that_has_been_evaluated() -> None:
    net, x = enabled(small_cnn()), torch.randn(4, 3, 4, 4)
    train(net, x)
    best, expected = copy.deepcopy(net.state_dict()), net.eval()(x)
    train(net.train(), x)
    assert not torch.equal(net.eval()(x), expected)
    net.load_state_dict(best)
    assert torch.equal(net(x), expected)


def test_validation_between_forward_and_backward_changes_no_gradient() -> None:
    net, x = enabled(mlp()), torch.randn(4, 8)
    twin = copy.deepcopy(net)
    twin(x).square().sum().backward()
    loss = net(x).square().sum()
    with torch.no_grad():
        net.eval()(torch.randn(4, 8))
    net.train()
    loss.backward()
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_training_in_evaluation_mode_trains() -> None:
    net, x = enabled(mlp()).eval(), torch.randn(4, 8)
    before = all_bits(net)
    train(net, x, steps=1)
    changed = {name for name, value in all_bits(net).items() if value != before[name]}
    assert changed == set(trainable(net))


@pytest.mark.parametrize("padding", [None, "keys", "causal"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_the_fast_path_of_a_transformer_encoder_sees_the_adapter(
    monkeypatch: pytest.MonkeyPatch, padding: str | None, grad: bool
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    net = enabled(copy.deepcopy(base))
    x, lengths = torch.randn(3, 5, 16), torch.tensor([5, 3, 2])
    masks: dict[str, Any] = {}
    if padding == "keys":
        masks = {"src_key_padding_mask": torch.arange(5) >= lengths[:, None]}
    if padding == "causal":
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        masks = {"mask": mask, "is_causal": True}

    fast, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a)
    )
    with torch.set_grad_enabled(grad):
        output = net(x, **masks)
        if not grad:
            assert len(calls) == 2, "the fast path was not taken"
        expected = merged(net, base)(x, **masks)
    real = torch.ones(3, 5, dtype=torch.bool)
    if padding == "keys":
        real = ~masks["src_key_padding_mask"]
    torch.testing.assert_close(output[real], expected[real], rtol=1e-9, atol=1e-9)
    assert (output - base(x, **masks))[real].abs().max() > 1e-3


class ReadsWeight(nn.Module):
    """Uses the weights of its layers, and never calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.table = nn.Embedding(4, 8)

    def forward(self, index: Tensor) -> Tensor:
        hidden = F.linear(self.table.weight[index], self.linear.weight, self.linear.bias)
        return F.conv1d(hidden.transpose(1, 2), self.conv.weight, self.conv.bias)


def test_code_that_reads_a_weight_sees_the_adapter() -> None:
    base = ReadsWeight()
    net, index = enabled(copy.deepcopy(base)), torch.randint(0, 4, (2, 6))
    assert_same_training(net, base, lambda m: m(index))


# --- layers ------------------------------------------------------------------------------------

ATTENTION = {
    "packed": {},
    "other kdim": {"kdim": 6},
    "other kdim and vdim": {"kdim": 6, "vdim": 4},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
}


@pytest.mark.parametrize("settings", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("split", [False, True], ids=["one", "split_qkv"])
def test_multihead_attention_is_adapted(settings: dict[str, Any], split: bool) -> None:
    base = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
    net = enabled(copy.deepcopy(base), LORA(rank=2, split_qkv=split))
    names = ("q_proj", "k_proj", "v_proj") if {"kdim", "vdim"} & set(settings) else ("in_proj",)
    parts = {name.partition("_weight")[0] for name in trainable(net) if "_weight_" in name}
    assert parts == set(names)
    assert {"out_proj.lora_A", "out_proj.lora_B"} < set(trainable(net))
    if split and names == ("in_proj",):
        assert net.in_proj_weight_lora_A.shape == (3, 2, 8)
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, settings.get("kdim", 8))
    v = torch.randn(2, 5, settings.get("vdim", 8))
    assert_same_training(net, base, lambda m: m(q, k, v)[0])
    assert_same_training(net.eval(), base.eval(), lambda m: m(q, k, v, need_weights=False)[0])


def test_out_proj_alone_can_be_adapted() -> None:
    base = nn.MultiheadAttention(8, 2)
    cap = (mc_name("out_proj"), ma_adapt("lora"))
    net, x = enabled(copy.deepcopy(base), FineTuningStrategy([cap])), torch.randn(3, 2, 8)
    assert trainable(net) == ["out_proj.lora_B", "out_proj.lora_A"]
    assert_same_training(net, base, lambda m: m(x, x, x)[0])


def test_forwards_of_attention_do_not_rewrite_a_bfloat16_base() -> None:
    base = nn.MultiheadAttention(8, 2).bfloat16()
    net, x = enabled(copy.deepcopy(base)), torch.randn(3, 2, 8, dtype=torch.bfloat16)
    for mode in (True, False) * 5:
        net.train(mode)(x, x, x)[0].sum().backward()
    now = all_bits(net)
    assert {name: now[name] for name in all_bits(base)} == all_bits(base)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("layout", ["balanced", "out_as_h"])
def test_a_convolution_pads_its_delta_as_it_pads_itself(mode: str, layout: str) -> None:
    base = nn.Conv2d(4, 6, 3, padding=2, padding_mode=mode)
    net = enabled(copy.deepcopy(base), LORA(conv_layout=layout))
    x = torch.randn(2, 4, 5, 5)
    assert_same_training(net, base, lambda m: m(x))


CONVOLUTIONS = {
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "dilated, strided, padded": lambda: nn.Conv2d(4, 6, (3, 2), 2, (2, 1), (2, 3)),
    "same": lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "grouped, rank that groups do not divide": lambda: nn.Conv2d(8, 8, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("layout", ["balanced", "out_as_h"])
def test_a_convolution_of_any_kind_is_adapted(make: Callable[[], nn.Module], layout: str) -> None:
    base = make()
    net = enabled(copy.deepcopy(base), LORA(rank=3, clip_rank=True, conv_layout=layout))
    x = torch.randn(2, base.in_channels, 7, 7)
    assert_same_training(net, base, lambda m: m(x))


def test_a_delta_larger_than_its_depthwise_layer_is_reported() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 1))
    with pytest.warns(
        GiftWarning, match=r"more parameters than the weight.*: 0\.weight \("
    ) as warned:
        report = enable_fine_tuning(net, LORA())
    assert len(warned) == 1
    assert report.larger_than_weight == ["0.weight"]
    assert net[0].lora_A.numel() + net[0].lora_B.numel() > net[0].weight.numel()


def test_a_delta_larger_than_its_layer_is_reported_inside_a_claimed_block() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 3))
    strategy = FineTuningStrategy([(mc_name("block"), ma_adapt("lora"))])
    with pytest.warns(GiftWarning, match=r"block\.0"):
        enable_fine_tuning(nn.ModuleDict({"block": block}), strategy)


def fixed(*shape: int) -> Callable[[], tuple[Tensor]]:
    """The same input at each call."""
    return lambda: (torch.arange(math.prod(shape), dtype=torch.float64).sin().reshape(shape),)


def packed() -> tuple[Any]:
    return (pack_padded_sequence(*fixed(5, 3, 4)(), torch.tensor([5, 3, 2])),)


def tokens() -> tuple[Tensor]:
    return (torch.arange(10),)


BAG = (torch.tensor([1, 2, 9, 2, 0, 5, 5]), torch.tensor([0, 3, 5]))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2), fixed(2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2), fixed(2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3, 2), fixed(2, 4, 3, 3, 3)),
    "LSTM": (lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=5), fixed(5, 3, 4)),
    "LSTM, packed": (lambda: nn.LSTM(4, 6), packed),
    "GRU": (lambda: nn.GRU(4, 6, 2, batch_first=True), fixed(3, 5, 4)),
    "RNN": (lambda: nn.RNN(4, 6, bidirectional=True), fixed(5, 3, 4)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 6), fixed(3, 4)),
    "GRUCell": (lambda: nn.GRUCell(4, 6), fixed(3, 4)),
    "RNNCell": (lambda: nn.RNNCell(4, 6), fixed(3, 4)),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 6), lambda: fixed(3, 4)() * 2),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 6, mode="mean"), lambda: BAG),
    "Embedding": (lambda: nn.Embedding(10, 6, padding_idx=2), tokens),
    "Embedding, max_norm": (lambda: nn.Embedding(10, 6, max_norm=50.0), tokens),
    "Embedding, sparse": (lambda: nn.Embedding(10, 6, sparse=True), tokens),
}


def first_tensor(result: Any) -> Tensor:
    """Of what a layer gives: recurrent layers give tuples, and packed sequences are ones too."""
    return result if isinstance(result, Tensor) else first_tensor(result[0])


@pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS)
def test_layers_that_others_skip_or_refuse_are_adapted(
    make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]]
) -> None:
    base = make()
    weights = [name for name, _ in base.named_parameters() if "weight" in name]
    net = enabled(copy.deepcopy(base), LORA(rank=2))
    assert len(trainable(net)) == 2 * len(weights)
    if getattr(base, "sparse", False):  # the reference wants the gradient as a plain tensor
        base.sparse = False
    assert_same_training(net, base, lambda m: first_tensor(m(*inputs())))


def test_the_row_of_padding_stays_what_it_is() -> None:
    net = nn.Embedding(10, 6, padding_idx=2)
    enable_fine_tuning(net, LORA())
    train(nn.Sequential(net), torch.arange(10))
    assert torch.equal(net(torch.tensor([2])), torch.zeros(1, 6))
    assert net(torch.tensor([3])).ne(net._parameters["weight"][3]).any()


def test_norms_are_trained_or_adapted_where_a_cap_says_so() -> None:
    base = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.BatchNorm1d(6, affine=True))
    x = torch.randn(4, 8)
    strategy = FineTuningStrategy(
        [(mc_type(nn.BatchNorm1d), ma_train())],
        [(mc_type(nn.LayerNorm) & pc_name("weight"), pa_adapt("lora", rank=1))],
    )
    net = enabled(copy.deepcopy(base).eval(), strategy)
    assert trainable(net) == ["1.lora_B", "1.lora_A", "2.weight", "2.bias"]
    assert_same_training(net, base.eval(), lambda m: m(x))


class Raw(nn.Module):
    """Raw parameters of several ranks, at the root and in containers, used by no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8))
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.kernel = nn.Parameter(torch.randn(6, 6, 3, 1))
        self.gain = nn.Parameter(torch.randn(6))
        self.several = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.named = nn.ParameterDict({"out": torch.randn(5, 6)})

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.matrix.T + self.position
        for expert in self.experts:
            x = torch.tanh(x @ expert.T)
        x = F.conv2d(x.transpose(1, 2)[..., None], self.kernel, padding=(1, 0))[..., 0]
        x = x.transpose(1, 2) * self.gain
        for matrix in self.several:
            x = x @ matrix
        return x @ self.named["out"].T


def test_any_raw_parameter_is_adapted_the_roots_too() -> None:
    base = Raw()
    strategy = FineTuningStrategy(para_caps=[(pc_any(), pa_adapt("lora", clip_rank=True))])
    net, x = enabled(copy.deepcopy(base), strategy), torch.randn(2, 4, 8)
    assert len(trainable(net)) == 2 * len(list(base.parameters()))
    assert net.experts_lora_A.shape == (3, 3, 6), "each expert has its own factors"
    assert_same_training(net, base, lambda m: m(x))


def test_raw_parameters_have_dropout() -> None:
    """One mask over the input features: some columns of the delta are doubled, the others gone."""
    base = Raw()
    caps = [(pc_name("matrix"), pa_adapt("lora", lora_dropout=0.5))]
    net = enabled(copy.deepcopy(base), FineTuningStrategy(para_caps=caps))
    update = net.matrix_lora_B @ net.matrix_lora_A
    ratios = torch.stack([((net.matrix - base.matrix) / update).mean(0) for _ in range(20)])
    assert set(ratios.round(decimals=6).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(net.eval().matrix - base.matrix, update)


def test_the_experts_of_a_mixture_are_adapted() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        experts_implementation="eager",  # the other ones know no float64
    )  # fmt: skip
    base = MixtralForCausalLM(config).double().eval()
    strategy = FineTuningStrategy(para_caps=[(pc_ndim(3, 3), pa_adapt("lora", rank=2))])
    net, tokens = enabled(copy.deepcopy(base), strategy), torch.randint(0, 32, (2, 7))
    shapes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in net.named_parameters()
              if p.requires_grad}  # fmt: skip
    assert shapes == {
        "gate_up_proj_lora_B": (3, 48, 2), "gate_up_proj_lora_A": (3, 2, 16),
        "down_proj_lora_B": (3, 16, 2), "down_proj_lora_A": (3, 2, 24),
    }  # fmt: skip
    assert_same_training(net, base, lambda m: m(input_ids=tokens).logits)


@pytest.mark.parametrize("name", ["nf_resnet26", "test_nfnet"])
def test_every_standardised_convolution_of_timm_is_found(name: str) -> None:
    net = timm.create_model(name, num_classes=10)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    assert sum(isinstance(m, ScaledStdConv2d) for m in net.modules()) > 10
    claims = plan_fine_tuning(net, LORA(rank=1)).claims
    assert [c.name for c in claims if c.class_name != "Linear"] == names


def test_the_delta_of_a_standardised_convolution_goes_where_its_forward_reads_the_weight() -> None:
    base = timm.create_model("test_nfnet", num_classes=10).double().eval()
    net, x = enabled(copy.deepcopy(base), LORA(rank=1)), torch.randn(2, 3, 32, 32)
    assert_same_training(net, base, lambda m: m(x))


# --- computed weights --------------------------------------------------------------------------

COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_computed_weight_is_adapted_after_it_was_computed(
    compute: Callable[[nn.Module], nn.Module], training: bool
) -> None:
    """A spectral norm moves with each training step, so `base` and `net` step together."""
    twins = []
    for _ in range(3):  # some of these cannot be copied
        torch.manual_seed(1)
        twins.append(compute(nn.Linear(8, 6)).train(training))
    base, net, fresh, x = *twins, torch.randn(4, 8)
    enabled(net)
    assert trainable(net) == ["lora_B", "lora_A"]
    b, a = net.lora_B.detach(), net.lora_A.detach()
    expected, output = base(x).detach() + x @ (b @ a).T, net(x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    torch.testing.assert_close(net.lora_B.grad, 2 * expected.T @ x @ a.T)
    torch.testing.assert_close(net.lora_A.grad, 2 * b.T @ expected.T @ x)
    torch.testing.assert_close(net.weight, base.weight + b @ a)
    disable_fine_tuning(net)
    assert torch.equal(net(x), fresh(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_looking_at_a_computed_weight_changes_nothing(
    compute: Callable[[nn.Module], nn.Module],
) -> None:
    net, x = compute(nn.Linear(8, 6)).train(), torch.randn(4, 8)
    before, output = all_bits(net), net.eval()(x)
    plan_fine_tuning(net.train(), LORA())
    assert all_bits(net) == before
    enable_fine_tuning(net, LORA(rank=2))
    assert torch.equal(net.eval()(x), output)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_a_normed_weight_hides_no_other_weight_of_a_recurrent_layer(norm: Any) -> None:
    net = norm(nn.LSTM(4, 6, bidirectional=True), "weight_ih_l0")
    enabled(net, LORA(rank=2))
    adapted = {name.removesuffix("_lora_A") for name in trainable(net) if "lora_A" in name}
    assert adapted == {
        f"weight_{kind}_l0{end}" for kind in ("ih", "hh") for end in ("", "_reverse")
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_a_norm_for_an_adapted_weight_is_refused_and_changes_nothing(norm: Any) -> None:
    net = enabled(nn.Linear(8, 6))
    names, x = list(net._parameters), torch.randn(4, 8)
    before, output = full_state(net), net(x)
    assert names[0] == "weight"
    with pytest.raises(RuntimeError, match="'weight' is adapted and cannot be parametrised"):
        norm(net)
    assert list(net._parameters) == names
    assert full_state(net) == before
    assert torch.equal(net(x), output)


# --- tied --------------------------------------------------------------------------------------


def through_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize(
    "move", [lambda m: m, copy.deepcopy, through_pickle, lambda m: m.to(torch.float64).cpu()]
)
@pytest.mark.parametrize("strategy", [LORA, LoRALinearFineTuningStrategy])
def test_a_tied_head_has_one_delta_and_stays_tied(move: Any, strategy: Any) -> None:
    base = gpt2()
    net, tokens = move(enabled(copy.deepcopy(base), strategy(rank=2))), torch.randint(0, 40, (2, 9))
    head, table = net.lm_head, net.transformer.wte
    assert head._parameters["weight"] is table._parameters["weight"]
    names = [name for name in trainable(net) if "lm_head" in name or "wte" in name]
    assert len(names) == 2
    assert torch.equal(head.weight, table.weight)
    assert_same_training(net, base, lambda m: m(input_ids=tokens).logits)
    disable_fine_tuning(net)
    assert net.lm_head.weight is net.transformer.wte.weight


def test_the_report_counts_a_tied_delta_once() -> None:
    report = plan_fine_tuning(gpt2(), LORA(rank=2))
    assert sum(claim.trainable for claim in report.claims) == report.trainable_after


@pytest.mark.parametrize("move", [lambda m: m, copy.deepcopy, through_pickle])
def test_a_module_under_two_names_is_adapted_once(move: Any) -> None:
    shared = nn.Linear(8, 8)
    base = nn.Sequential(shared, nn.Tanh(), shared)
    net, x = move(enabled(copy.deepcopy(base))), torch.randn(3, 8)
    assert net[0] is net[2]
    assert trainable(net) == ["0.lora_B", "0.lora_A"]
    assert_same_training(net, base, lambda m: m(x))


# --- statistics, base, flags -------------------------------------------------------------------


def test_running_statistics_are_saved_with_the_delta() -> None:
    base, x = small_cnn(), torch.randn(8, 3, 4, 4) * 5 + 2
    net = enabled(copy.deepcopy(base))
    train(net, x)
    fresh = enabled(copy.deepcopy(base))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    assert not torch.equal(net[1].running_mean, base[1].running_mean)


def test_frozen_statistics_survive_train() -> None:
    base, x = small_cnn(), torch.randn(8, 3, 4, 4) * 5 + 2
    net = enabled(copy.deepcopy(base), LORA(freeze_statistics=True))
    assert torch.equal(net.train()(x), net.eval()(x))
    train(net.train(), x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(net[1], name), getattr(base[1], name))
    assert disable_fine_tuning(net.train())[1].training, "the mode that was asked for comes back"


def test_a_bigger_module_saves_no_frozen_base() -> None:
    outer = nn.ModuleDict({"inner": enabled(small_cnn()), "head": nn.Linear(10, 2)})
    inner = {f"inner.{name}" for name in outer["inner"].state_dict()}
    assert set(outer.state_dict()) == inner | {"head.weight", "head.bias"}
    assert not any(name.endswith(".weight") for name in inner)


@pytest.mark.parametrize("kind", ["enable and disable", "save and load"])
def test_a_thousand_rounds_leave_a_bfloat16_base_bit_exact(kind: str) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16()
    base, x = all_bits(net), torch.randn(4, 16, dtype=torch.bfloat16)
    if kind == "save and load":
        enable_fine_tuning(net, LORA())
    for _ in range(1000):
        if kind == "enable and disable":
            enable_fine_tuning(net, LORA())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.uniform_(-1, 1)
        net.eval()(x)
        net.train()(x)
        if kind == "save and load":
            net.load_state_dict(net.state_dict())
        else:
            disable_fine_tuning(net)
    if kind == "save and load":
        disable_fine_tuning(net)
    assert all_bits(net) == base


@pytest.mark.parametrize("train_bias", [False, True])
def test_biases_are_trained_where_asked_for_only(train_bias: bool) -> None:
    net = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.LSTM(4, 6), nn.LayerNorm(8), nn.Linear(8, 8)])
    net.append(nn.MultiheadAttention(8, 2))
    enabled(net, LORA(rank=2, train_bias=train_bias))
    layers = {f"{i}.{name}" for i, layer in enumerate(net) for name, _ in layer.named_parameters()
              if "bias" in name and not isinstance(layer, nn.LayerNorm)}  # fmt: skip
    assert {name for name in trainable(net) if "bias" in name} == (layers if train_bias else set())


def test_enabling_twice_is_refused() -> None:
    net = enabled(mlp())
    for again in (net, nn.Sequential(net), net[0]):
        before = full_state(again)
        with pytest.raises(RuntimeError, match=r"already being fine-tuned.*disable_fine_tuning"):
            enable_fine_tuning(again, LORA())
        assert full_state(again) == before


def test_a_failure_half_way_leaves_the_network_as_it_was() -> None:
    net = resnet18(num_classes=10)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    net.layer1.register_forward_hook(lambda *call: None)
    seen: list[str] = []

    def adapt_a_few(*place: Any) -> None:
        seen.append(place[2])
        if len(seen) == 15:
            raise KeyError("the fifteenth layer")
        ma_adapt("lora")(*place)

    before = full_state(net)
    with pytest.raises(KeyError, match="the fifteenth layer") as caught:
        enable_fine_tuning(net, FineTuningStrategy([(mc_layer(), adapt_a_few)]))
    assert full_state(net) == before
    assert any(seen[-1] in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": math.nan}, "lora_dropout is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"{found}, expected"):
        LORA(**settings)


def test_a_rank_that_no_weight_can_have_is_refused_with_every_layer_named() -> None:
    net = mlp()
    before = full_state(net)
    with pytest.raises(ValueError, match="rank 1000 is above 8") as caught:
        enable_fine_tuning(net, LORA(rank=1000))
    assert [f"{path}.weight" in str(caught.value) or f"{path} (Linear)" in str(caught.value)
            for path in ("0", "3")] == [True, True]  # fmt: skip
    assert full_state(net) == before


def test_a_name_that_nothing_has_is_refused_with_the_closest() -> None:
    net = bert()
    before = full_state(net)
    for check in (mc_name("clasifier"), lambda *place: place[1] == "clasifier"):
        with pytest.raises(
            ValueError, match=r"matched anything.*\n.*closest names: .*'classifier'"
        ):
            enable_fine_tuning(net, FineTuningStrategy([(check, ma_train())]))
    assert full_state(net) == before


def test_one_misspelt_target_of_several_is_warned_about() -> None:
    strategy = FineTuningStrategy(
        [(mc_name("query"), ma_adapt("lora")), (mc_name("valeu"), ma_adapt("lora"))]
    )
    with pytest.warns(GiftWarning, match=r"module cap 1: .*'valeu'.* took nothing.*'value'"):
        report = enable_fine_tuning(bert(), strategy)
    assert [text.partition(":")[0] for text in report.unmatched] == ["module cap 1"]
    assert {claim.name.rpartition(".")[2] for claim in report.claims} == {"query"}


def test_old_gradients_move_no_frozen_weight() -> None:
    net, x = mlp(), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)  # of all, and before
    net(x).square().sum().backward()
    before = all_bits(net)
    enable_fine_tuning(net, LORA())
    optimizer.step()
    net(x).square().sum().backward()
    optimizer.step()
    assert {name: all_bits(net)[name] for name in before} == before


def test_hooks_fire_once_with_the_adapted_output_and_references_see_the_adapter() -> None:
    base, x = mlp(), torch.randn(4, 8)
    net, seen = copy.deepcopy(base), []
    layer, container = net[0], {"first": net[0]}
    layer.register_forward_hook(lambda module, args, output: seen.append((module, output)))
    enabled(net)
    net[0].register_forward_hook(lambda module, args, output: seen.append((module, output)))
    net(x)
    assert layer is net[0] is container["first"]
    assert isinstance(layer, nn.Linear)
    assert [module for module, _ in seen] == [layer, layer]
    expected = x @ (base[0].weight + layer.lora_B @ layer.lora_A).T + base[0].bias
    for _, output in seen:
        torch.testing.assert_close(output, expected)
    torch.testing.assert_close(container["first"](x), expected)


def test_backward_and_pre_hooks_fire_once() -> None:
    net, calls = mlp(), []
    net[0].register_forward_pre_hook(lambda *call: calls.append("pre"))
    net[0].register_full_backward_hook(lambda *call: calls.append("back"))
    enabled(net)(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "back"]


def test_a_network_from_the_meta_device_gets_an_initialised_delta() -> None:
    with torch.device("meta"):
        net = mlp()
    enable_fine_tuning(net, LORA())
    base, x = mlp(), torch.randn(2, 8)
    net.to_empty(device="cpu")
    net.load_state_dict(base.state_dict())
    assert torch.equal(net(x), base(x))
    for layer in (net[0], net[3]):
        assert torch.equal(layer.lora_B, torch.zeros_like(layer.lora_B))
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.2 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.unique().numel() == layer.lora_A.numel()


NO_SUCH_NAME = "(not registered|not plain YAML|'name' and 'init_paras')"


@pytest.mark.parametrize(
    "config",
    [
        {"name": "os.system", "init_paras": {"*": ["touch broken"]}},
        {"name": "system", "init_paras": {"command": "touch broken"}},
        {"target": "os.system", "params": ["touch broken"]},
        {
            "name": "FineTuningStrategy",
            "init_paras": {"module_caps": [[{"name": "os.system", "init_paras": {}}, None]]},
        },
        "!!python/object/apply:os.system ['touch broken']",
    ],
)
def test_a_file_that_names_foreign_code_runs_none(
    config: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    (tmp_path / "strategy.yaml").write_text(text)
    with pytest.raises(ValueError, match=NO_SUCH_NAME):
        load_strategy_from_config(tmp_path / "strategy.yaml")
    assert os.listdir(tmp_path) == ["strategy.yaml"]


def test_a_cap_registered_on_one_strategy_leaks_into_no_other() -> None:
    for make in (FineTuningStrategy, LORA, FullFineTuningStrategy):
        one, other = make(), make()
        caps = len(other.module_caps), len(other.para_caps)
        one.register_module_cap(mc_name("fc"), ma_train())
        one.register_para_cap(pc_name("bias"), pa_train())
        for strategy in (other, make()):
            assert (len(strategy.module_caps), len(strategy.para_caps)) == caps
        assert (len(one.module_caps), len(one.para_caps)) == (caps[0] + 1, caps[1] + 1)
        assert other.init_paras == make().init_paras


def test_a_submodule_that_is_none_is_skipped() -> None:
    net = resnet18()
    net.fc = None
    report = enable_fine_tuning(net, LORA())
    assert len(report.claims) == 20
    assert disable_fine_tuning(net).fc is None


def test_freezing_the_network_and_back_brings_the_chosen_parameters_only() -> None:
    net = enabled(bert(), merge_strategies([HeadReplacementStrategy(4), LORA()]))
    chosen = trainable(net)
    assert {"classifier.weight", "classifier.bias"} < set(chosen)
    net.requires_grad_(False)
    assert trainable(net) == []
    assert len(list(net.parameters())) == len(chosen)
    assert set(net.state_dict()) >= set(chosen)
    net.requires_grad_(True)
    assert trainable(net) == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strategy", [LORA, FreezeStrategy], ids=lambda s: s.__name__)
def test_dtype_and_device_of_a_transformers_model_are_the_bases(
    dtype: torch.dtype, strategy: Any
) -> None:
    net = enabled(bert().to(dtype), strategy())
    assert net.dtype == dtype
    assert net.device == torch.device("cpu")
    assert net(input_ids=torch.arange(6)[None]).logits.dtype == dtype
    parts = {p.dtype for p in net.parameters()}
    assert parts <= {torch.promote_types(dtype, torch.float32)}


class Encoder(nn.Module):
    pass


class Decoder(nn.Module):
    pass


class FirstEncoder(Encoder):
    pass


def test_strategies_for_disjoint_types_are_not_merged() -> None:
    some = [FineTuningStrategy([(mc_name("a"), ma_freeze())], constraint_type=t)
            for t in (Encoder, Decoder, FirstEncoder)]  # fmt: skip
    with pytest.raises(ValueError, match=r"no common network.*Encoder.*Decoder"):
        merge_strategies(some[:2])
    assert merge_strategies(some[::2]).constraint_type == (FirstEncoder,)
