"""Open caps: what wraps a module leaves it to the other caps of a strategy."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from transformers import BertConfig, BertForSequenceClassification

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
    Action,
    ma_adapt,
    ma_bottleneck,
    ma_freeze,
    ma_prompt,
    ma_replace_head,
    ma_train,
    mc_any,
    mc_blocks,
    mc_layer,
    mc_name,
    mc_path,
    mc_type,
    pa_train,
    pc_any,
)
from gift.methods import LoRA
from gift.strategies import (
    BottleneckFineTuningStrategy,
    DebugStrategy,
    HeadReplacementStrategy,
    LoRALinearFineTuningStrategy,
    PromptFineTuningStrategy,
)
from tests.cases.calls import encoder, fill, small
from tests.common import full_state, trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

Bottlenecks = BottleneckFineTuningStrategy
KEYS = [f"bottleneck_{key}" for key in ("down_weight", "down_bias", "up_weight", "up_bias")]


def classifier() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        intermediate_size=24, max_position_embeddings=16, num_labels=3)).eval()  # fmt: skip


# --- with other caps -----------------------------------------------------------------------------


def test_bottlenecks_lora_and_a_new_head_in_one_strategy() -> None:
    """Blocks are wrapped, layers in them adapted, the head is new; all else is frozen."""
    net = classifier()
    base, ids = copy.deepcopy(net), torch.randint(0, 20, (2, 5))
    parts = [Bottlenecks(4), HeadReplacementStrategy(5), LoRALinearFineTuningStrategy(rank=2)]
    report = enable_fine_tuning(net, merge_strategies(parts))
    layers = [name for name, m in base.named_modules() if type(m) is nn.Linear]
    expected = [f"bert.encoder.layer.{i}.{key}" for i in (0, 1) for key in KEYS]
    expected += [f"{layer}.lora_{factor}" for layer in layers[:-1] for factor in "BA"]
    assert sorted(trainable(net)) == sorted([*expected, "classifier.weight", "classifier.bias"])
    assert torch.equal(net.bert(ids).pooler_output, base.bert(ids).pooler_output)
    net(ids).logits.sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))
    sizes: dict[int, int] = {}
    for claim in report.claims:
        sizes[claim.cap] = sizes.get(claim.cap, 0) + claim.trainable
    by_name = dict(net.named_parameters())
    bottlenecks = sum(by_name[name].numel() for name in expected if "bottleneck" in name)
    loras = sum(by_name[name].numel() for name in expected if "lora" in name)
    assert sizes == {0: bottlenecks, 1: 5 * 16 + 5, 2: loras}
    assert report.trainable_after == sum(sizes.values())
    assert {c.what for c in report.claims if c.cap == 0} == {"bottleneck(size=4)"}
    assert not set(report.frozen) & set(trainable(net))
    assert {n for n, _ in base.named_parameters() if "LayerNorm" in n} <= set(report.frozen)


def test_it_counts_by_the_formula_of_its_documentation() -> None:
    report = plan_fine_tuning(nn.Linear(10, 6), Bottlenecks(3, after="", parallel=True))
    assert report.claims[0].trainable == 3 * (10 + 6 + 1) + 6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_on_the_wrapped_layer_itself(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bottleneck stands after the adapted layer, which keeps its fast path and its dropout."""
    lora = LoRALinearFineTuningStrategy(rank=2, lora_dropout=dropout)
    net, alone, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(3, 8)
    alone.load_state_dict(net.state_dict())
    enable_fine_tuning(net, merge_strategies([Bottlenecks(2, after=""), lora]))
    enable_fine_tuning(alone, lora)
    fill(net)
    for name in ("lora_A", "lora_B"):
        getattr(alone, name).data.copy_(getattr(net, name))
    monkeypatch.setattr(LoRA, "effective_weight", None)  # what makes the whole weight
    torch.manual_seed(1)
    output = net(x)
    torch.manual_seed(1)
    f = alone(x)
    down, down_bias, up, up_bias = (getattr(net, key) for key in KEYS)
    hidden = nn.functional.gelu(f @ down.T + down_bias)
    torch.testing.assert_close(output, f + hidden @ up.T + up_bias)


# what a later cap does to a wrapped layer (8, 8), and what is trained then
LATER: dict[str, tuple[Any, list[str]]] = {
    "nothing": (None, []),
    "freeze": ((mc_name("2"), ma_freeze()), []),
    "train": ((mc_name("2"), ma_train()), ["2.bias", "2.weight"]),
    "a lambda": ((mc_name("2"), lambda *place: None), ["2.bias", "2.weight"]),
    "adapt": ((mc_name("2"), ma_adapt(rank=1)), ["2.lora_A", "2.lora_B"]),
    "replace": ((mc_name("2"), ma_replace_head(4)), ["2.bias", "2.weight"]),
}


@pytest.mark.parametrize(("cap", "trained"), LATER.values(), ids=LATER)
def test_a_later_cap_takes_the_module_and_not_its_extension(cap: Any, trained: list[str]) -> None:
    net = small()
    before = full_state(net)
    caps = [(mc_name("2"), ma_bottleneck(3)), *([cap] if cap else [])]
    report = enable_fine_tuning(net, FineTuningStrategy(caps))
    assert sorted(trainable(net)) == sorted([*trained, *(f"2.{key}" for key in KEYS)])
    width = 4 if net[2].out_features == 4 else 8  # of what stands there now
    counts = {claim.cap: claim.trainable for claim in report.claims}
    assert counts[0] == 2 * 3 * width + 3 + width
    assert sum(counts.values()) == report.trainable_after
    assert net(torch.randn(2, 8)).shape == (2, width)
    disable_fine_tuning(net)
    assert full_state(net) == before


def test_parameter_caps_reach_a_wrapped_module() -> None:
    net = small()
    strategy = FineTuningStrategy([(mc_name("2"), ma_bottleneck(3))], [(pc_any(), pa_train())])
    enable_fine_tuning(net, strategy)
    assert set(trainable(net)) == {n for n, _ in net.named_parameters()}


def test_an_earlier_cap_keeps_what_it_claimed() -> None:
    net = small()
    with pytest.warns(GiftWarning, match=r"ma_bottleneck\(size=3\) took nothing"):
        enable_fine_tuning(net, FineTuningStrategy([(mc_name("2"), ma_train()),
                                                    (mc_name("2"), ma_bottleneck(3))]))  # fmt: skip
    assert trainable(net) == ["2.weight", "2.bias"]


def test_what_a_later_cap_removes_cannot_be_wrapped() -> None:
    def remove(parent: Any, name: str, *rest: Any) -> None:
        parent._modules[name] = None

    net = small()
    before = full_state(net)
    caps = [(mc_name("2"), ma_bottleneck(3)), (mc_name("2"), remove)]
    with pytest.raises(ValueError, match=r"2 \(Linear\).*nothing to act on"):
        enable_fine_tuning(net, FineTuningStrategy(caps))
    assert full_state(net) == before


def test_two_extensions_on_one_module() -> None:
    """A prompt, then a bottleneck, which is outside: it sees what the prompted module gives."""
    net = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    twin, x = copy.deepcopy(net), torch.randn(2, 5, 8)
    prompts = PromptFineTuningStrategy(3)
    enable_fine_tuning(net, merge_strategies([prompts, Bottlenecks(2, after="")]))
    enable_fine_tuning(twin, prompts)
    assert trainable(net) == ["prompt_tokens", *KEYS]
    fill(net)
    twin.load_state_dict({"prompt_tokens": net.prompt_tokens})
    f = twin(x)
    down, down_bias, up, up_bias = (getattr(net, key) for key in KEYS)
    expected = f + nn.functional.gelu(f @ down.T + down_bias) @ up.T + up_bias
    torch.testing.assert_close(net(x), expected)


def test_one_module_takes_one_bottleneck() -> None:
    caps = [(mc_name("0"), ma_bottleneck(3)), (mc_type(nn.Linear), ma_bottleneck(2))]
    message = r"0 \(Linear\): it is already wrapped by bottleneck\(size=3\)"
    with pytest.raises(ValueError, match=message):
        enable_fine_tuning(small(), FineTuningStrategy(caps))


def test_a_module_under_two_names_is_wrapped_once() -> None:
    layer = nn.Linear(8, 8)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    report = enable_fine_tuning(net, FineTuningStrategy([(mc_type(nn.Linear), ma_bottleneck(3))]))
    assert [claim.name for claim in report.claims] == ["0"]
    assert trainable(net) == [f"0.{key}" for key in KEYS]
    disable_fine_tuning(net)
    assert type(net[0]) is nn.Linear


def test_an_open_strategy_in_the_place_of_an_action() -> None:
    net = nn.ModuleDict({"body": encoder(), "head": nn.Linear(8, 2)})
    caps = [(mc_name("body"), merge_strategies([Bottlenecks(2), LoRALinearFineTuningStrategy()])),
            (mc_name("head"), ma_train())]  # fmt: skip
    report = enable_fine_tuning(net, FineTuningStrategy(caps))
    assert {claim.cap for claim in report.claims} == {0, 1}
    assert sum("bottleneck" in name for name in trainable(net)) == 8
    assert "head.weight" in trainable(net)


def test_open_actions_of_ones_own() -> None:
    """Also one that must know the network, and one that does nothing to its module."""
    seen: list[str] = []

    def prepare(network: nn.Module) -> Callable[..., None]:
        return lambda *place: seen.append(place[2])

    action = Action(prepare=prepare, open=True)
    net = small()
    report = enable_fine_tuning(net, FineTuningStrategy([(mc_any(), action),
                                                         (mc_name("0"), ma_train())]))  # fmt: skip
    assert seen == ["0", "1", "2", ""], "each after all that is inside it"
    assert trainable(net) == ["0.weight", "0.bias"]
    assert {claim.what for claim in report.claims if claim.cap == 0} == {"left as it is"}
    assert sum(claim.trainable for claim in report.claims) == report.trainable_after == 72


def test_looking_at_open_caps_shows_what_they_leave_open(capsys: pytest.CaptureFixture) -> None:
    strategy = merge_strategies([Bottlenecks(2, after="*"), LoRALinearFineTuningStrategy(rank=1)])
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))
    plan = plan_fine_tuning(net, strategy)
    report = enable_fine_tuning(net, DebugStrategy(strategy))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "module cap 0 wraps the network",
        "module cap 0 wraps 0",
        "module cap 0 wraps 0.0",
        "module cap 1 claims 0.0",
    ]
    assert [(c.cap, c.name) for c in report.claims] == [(c.cap, c.name) for c in plan.claims]


# --- blocks --------------------------------------------------------------------------------------


def test_the_blocks_of_a_network() -> None:
    found = {claim.name for claim in plan_fine_tuning(resnet18(), Bottlenecks(2)).claims}
    assert found == {n for n, m in resnet18().named_modules() if isinstance(m, BasicBlock)}
    net = nn.ModuleDict({"a": small(), "b": nn.Sequential(nn.Linear(8, 8))})
    found = {claim.name for claim in plan_fine_tuning(net, Bottlenecks(2)).claims}
    assert found == {"a.0", "a.2", "b.0"}, "in all containers of that class"
    with pytest.raises(ValueError, match=r"no .* of modules of one class"):
        plan_fine_tuning(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), Bottlenecks(2))


@pytest.mark.parametrize("after", ["*.linear1", ["*.linear1", "nothing"], mc_name("linear1")])
def test_modules_by_name(after: Any) -> None:
    report = plan_fine_tuning(encoder(), Bottlenecks(2, after=after))
    assert [claim.name for claim in report.claims] == ["layers.0.linear1", "layers.1.linear1"]


@pytest.mark.parametrize("strategy", [
    merge_strategies([Bottlenecks(2, parallel=True, after="2", scaling=4.0),
                      PromptFineTuningStrategy(3, head="2")]),
    FineTuningStrategy([(mc_blocks() & mc_layer("linear"), ma_bottleneck(3, dtype="float64")),
                        (mc_path(""), ma_prompt(2, dim=8), {"num_virtual_tokens": 4})]),
    FineTuningStrategy([(mc_name("2"), ma_bottleneck(3), {"size": 4})]),
], ids=repr)  # fmt: skip
def test_a_strategy_as_a_file(strategy: FineTuningStrategy) -> None:
    loaded = load_strategy_from_config(strategy.to_config())
    assert repr(loaded) == repr(strategy)
    claims = [plan_fine_tuning(small(), s).claims for s in (strategy, loaded)]
    assert claims[0] == claims[1] != []
