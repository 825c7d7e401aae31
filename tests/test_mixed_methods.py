"""Several methods in one network: by layer, never two on one tensor."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning, merge_strategies
from gift.core.weights.record import weight_deltas
from gift.factories import ma_adapt, ma_train, mc_layer, mc_path, mc_type, pa_adapt, pc_name
from gift.strategies import (
    IA3LinearFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    SVDiffConvFineTuningStrategy,
)
from tests.common import full_state

WIDTH, INNER = 32, 48


def bert() -> Any:
    config = BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=INNER, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def mixed() -> FineTuningStrategy:
    """Methods, ranks and alphas by layer."""
    return FineTuningStrategy(
        [
            (mc_path("classifier"), ma_train()),
            (mc_path(regex=r".*layer\.0\..*(query|value)"), ma_adapt("dora", rank=8)),
            (mc_path(regex=r".*layer\.1\..*(query|value)"), ma_adapt("lora"), {"rank": 2}),
            (mc_path(regex=r".*intermediate\.dense"), ma_adapt("ia3")),
            (mc_path(regex=r".*layer\.\d\.output\.dense"), ma_adapt("ia3", feedforward=True)),
            (mc_path(regex=r".*attention\.output\.dense"), ma_adapt("svdiff", train_bias=True)),
            (mc_layer("embedding") & mc_path(contains="word"), ma_adapt("lora", rank=1)),
        ]
    )


@pytest.mark.filterwarnings("error")
def test_one_strategy_mixes_methods_by_layer() -> None:
    net = bert()
    base = copy.deepcopy(net)
    x = torch.randint(0, 50, (2, 9))
    report = enable_fine_tuning(net, mixed())
    assert torch.equal(net(x).logits, base(x).logits)
    counts = [
        3 * WIDTH + 3,  # the classifier
        2 * (8 * (WIDTH + WIDTH) + WIDTH),  # DoRA on query and value of one layer
        2 * 2 * (WIDTH + WIDTH),  # LoRA on those of the other
        2 * INNER,  # factors of outputs
        2 * INNER,  # factors of inputs
        2 * (WIDTH + WIDTH),  # shifts and biases
        50 + WIDTH,
    ]
    per_cap = [sum(c.trainable for c in report.claims if c.cap == n) for n in range(len(counts))]
    assert per_cap == counts
    assert sum(p.numel() for p in net.parameters()) == sum(counts)
    net(x).logits.square().sum().backward()
    torch.optim.AdamW(net.parameters(), lr=0.01).step()
    fresh = copy.deepcopy(base)
    enable_fine_tuning(fresh, mixed())
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x).logits, net(x).logits)
    assert not torch.equal(net(x).logits, base(x).logits)


def test_two_methods_on_one_tensor_are_an_error() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = full_state(net)

    def both(*place: Any) -> None:
        ma_adapt("ia3")(*place)
        ma_adapt("svdiff")(*place)

    with pytest.raises(
        ValueError, match=r"'weight' is already adapted by ia3.*a tensor can have one"
    ):
        enable_fine_tuning(net, FineTuningStrategy([(mc_type(nn.Linear), both)]))
    assert full_state(net) == before


def test_in_a_merge_the_first_strategy_takes_a_layer_and_the_other_is_named() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Conv2d(3, 8, 3))
    ia3, lora = IA3LinearFineTuningStrategy(), LoRALinearFineTuningStrategy()
    merged = merge_strategies([ia3, lora, SVDiffConvFineTuningStrategy()])
    with pytest.warns(GiftWarning, match=r"'lora'.*took nothing"):
        enable_fine_tuning(net, merged)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "0.ia3_l",
        "2.svdiff_delta",
    ]


def test_several_tensors_of_one_module_may_have_methods_of_their_own() -> None:
    net = nn.LSTM(8, 16)
    caps = [
        (pc_name("weight_ih_l0"), pa_adapt("lora", rank=1)),
        (pc_name("weight_hh_l0"), pa_adapt("svdiff")),
    ]
    x = torch.randn(3, 2, 8)
    before = net(x)[0]
    enable_fine_tuning(net, FineTuningStrategy(para_caps=caps))
    assert torch.equal(net(x)[0], before)
    assert {t: a.method.name for t, a in weight_deltas(net).items()} == {
        "weight_ih_l0": "lora",
        "weight_hh_l0": "svdiff",
    }
    net(x)[0].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
def test_a_delta_of_another_layout_is_refused_where_its_shape_is_the_same() -> None:
    def net(layout: str) -> nn.Module:
        conv = nn.Conv2d(4, 6, 3)
        action = ma_adapt("fourierft", n_frequency=10, conv_layout=layout)
        enable_fine_tuning(conv, FineTuningStrategy([(mc_layer("conv"), action)]))
        return conv

    state = net("balanced").state_dict()
    with pytest.raises(RuntimeError, match=r"'matrix': \[18, 12\].*\[6, 36\]"):
        net("out_as_h").load_state_dict(state)
    net("balanced").load_state_dict(state)


def test_a_layout_that_cuts_outputs_apart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'balanced'.*split an output.*'out_as_h'"):
        ma_adapt("dora", conv_layout="balanced")


def test_scaled_outputs_include_the_bias_and_a_raw_parameter_does_not() -> None:
    layer, raw = nn.Linear(4, 3), nn.Linear(4, 3)
    x, factors = torch.randn(2, 4), torch.tensor([2.0, 0.5, -1.0])
    outputs = layer(x)
    unbiased = raw(x) - raw.bias
    enable_fine_tuning(layer, IA3LinearFineTuningStrategy())
    enable_fine_tuning(raw, FineTuningStrategy(para_caps=[(pc_name("weight"), pa_adapt("ia3"))]))
    with torch.no_grad():
        for net in (layer, raw):
            net.ia3_l.copy_(factors[:, None])
    torch.testing.assert_close(layer(x), factors * outputs)
    torch.testing.assert_close(raw(x), factors * unbiased + raw._parameters["bias"])


def test_a_pruned_bias_is_scaled_as_it_is_computed() -> None:
    layer = nn.Linear(4, 3)
    nn.utils.prune.random_unstructured(layer, "bias", amount=1)
    x = torch.randn(2, 4)
    outputs = layer(x).detach()
    enable_fine_tuning(layer, IA3LinearFineTuningStrategy())
    assert torch.equal(layer(x), outputs)
    with torch.no_grad():
        layer.ia3_l.fill_(2.0)
    torch.testing.assert_close(layer(x), 2 * outputs)


def test_a_scaled_bias_can_be_trained_as_well() -> None:
    layer = nn.Linear(4, 3)
    enable_fine_tuning(layer, IA3LinearFineTuningStrategy(train_bias=True))
    with torch.no_grad():
        layer.ia3_l.fill_(2.0)
    layer(torch.randn(5, 4)).sum().backward()
    bias = layer.get_parameter("bias")
    torch.testing.assert_close(bias.grad, torch.full((3,), 10.0))  # five rows, scaled by two
