"""Strategies: the built-in ones, how caps claim, what is reported, and strategies as files."""

import contextlib
import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gift import (
    FineTuningStrategy,
    GiftWarning,
    ModuleIterator,
    disable_fine_tuning,
    enable_fine_tuning,
    load_strategy_from_config,
    merge_strategies,
    plan_fine_tuning,
)
from gift.factories import (
    ma_adapt,
    ma_freeze,
    ma_replace,
    ma_replace_head,
    ma_train,
    mc_any,
    mc_class_name,
    mc_last,
    mc_last_linear,
    mc_layer,
    mc_name,
    mc_path,
    mc_type,
    pa_adapt,
    pa_freeze,
    pa_train,
    pc_any,
    pc_name,
    pc_path,
)
from gift.strategies import (
    STRATEGIES,
    BitFitFineTuningStrategy,
    BottleneckFineTuningStrategy,
    DebugStrategy,
    DetectionHeadStrategy,
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    LoReFTFineTuningStrategy,
    MergedStrategy,
    ModulesFineTuningStrategy,
    NormFineTuningStrategy,
    PromptFineTuningStrategy,
    PTuningFineTuningStrategy,
    RecommendedFineTuningStrategy,
    SegmentationHeadStrategy,
    SizedStrategy,
    register_strategy,
)
from gift.strategies.resolved import ResolvedStrategy
from gift.support.recipes import REGISTRY
from gift.utils.info import collect_trainable_parameters, summary, table_info
from gift.utils.network_tool import trainable_parameters
from tests.common import all_bits, enabled, full_state, trainable

LORA = LoRAAllFineTuningStrategy


def small() -> nn.Sequential:
    """Two blocks and a head; wide enough that deltas are smaller than weights."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)),
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)),
        nn.Linear(16, 16),
    )


def names(net: nn.Module, *paths: str) -> list[str]:
    return [n for n, _ in net.named_parameters() if n.startswith(tuple(f"{p}." for p in paths))]


# --- the figures -------------------------------------------------------------------------------


class TestNet(nn.Module):
    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.nn_seq = nn.Sequential(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


PRINTED = """\
conv1 TestNet.conv1 Conv2d False
> TestNet.conv1 weight
> TestNet.conv1 bias
pool TestNet.pool MaxPool2d False
fc1 TestNet.fc1 Linear False
> TestNet.fc1 weight
> TestNet.fc1 bias
nn_seq TestNet.nn_seq Sequential True
"""


def printed(iterator: ModuleIterator) -> str:
    """The loop of the quick start."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for current_name, global_name, class_name, module, has_children in iterator:
            print(current_name, global_name, class_name, has_children)
            for name, _ in module.named_parameters(recurse=False):
                print(">", global_name, name)
    return out.getvalue()


def test_the_iterator_gives_the_direct_submodules() -> None:
    net = TestNet()
    iterator = ModuleIterator(net, "TestNet")
    assert printed(iterator) == PRINTED
    assert printed(iterator) == PRINTED, "it can be iterated again"
    assert len(iterator) == 4
    assert [entry[0] for entry in iterator] == ["conv1", "pool", "fc1", "nn_seq"]
    assert [entry[1] for entry in ModuleIterator(net, "")] == ["conv1", "pool", "fc1", "nn_seq"]
    assert [entry[1] for entry in ModuleIterator(net.nn_seq, "a.b")] == ["a.b.0", "a.b.1", "a.b.2"]
    assert list(ModuleIterator(nn.ReLU(), "x")) == []


def test_the_iterator_skips_what_is_none_and_knows_plain_classes() -> None:
    net = enabled(TestNet())
    assert printed(ModuleIterator(net, "TestNet")).splitlines()[0] == PRINTED.splitlines()[0]
    net.pool = None
    iterator = ModuleIterator(net)
    assert [entry[0] for entry in iterator] == ["conv1", "fc1", "nn_seq"]
    assert len(iterator) == 3
    net.nn_seq = nn.Sequential()
    net.nn_seq.nothing = None
    assert [entry[4] for entry in iterator] == [False, False, False]


def test_the_table_of_a_resnet18() -> None:
    """Its rows, by the rule: ``(o, i, kh, kw)`` is ``(o*kh, i*kw)``, B before A, rank 3."""
    net = resnet18()
    expected = []
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            o, i, kh, kw = module.weight.shape
            expected += [(f"{path}.lora_B", [o * kh, 3]), (f"{path}.lora_A", [3, i * kw])]
        if isinstance(module, nn.Linear):
            o, i = module.weight.shape
            expected += [(f"{path}.lora_B", [o, 3]), (f"{path}.lora_A", [3, i])]
    rows, before = collect_trainable_parameters(net)
    assert (before, len(rows)) == (11_689_512, 62)
    report = enable_fine_tuning(net, LORA())
    rows, after = collect_trainable_parameters(net)
    assert (after, len(rows)) == (75_063, 42)
    assert rows == [[n, *row, math.prod(row[1])] for n, row in enumerate(expected)]
    assert rows[:2] == [[0, "conv1.lora_B", [448, 3], 1344], [1, "conv1.lora_A", [3, 21], 63]]
    assert rows[14] == [14, "layer2.0.downsample.0.lora_B", [128, 3], 384]
    assert rows[41] == [41, "fc.lora_A", [3, 512], 1536]
    assert (report.trainable_before, report.trainable_after) == (11_689_512, 75_063)
    assert report.total_after == 11_689_512 + 75_063
    lines = table_info(rows, header=["index", "name", "shape", "count"]).splitlines()
    assert len(lines) == 42 + 2
    assert lines[0].split() == ["index", "name", "shape", "count"]
    assert lines[2].split() == ["0", "conv1.lora_B", "[448,", "3]", "1344"]
    assert {len(line) for line in lines[:2]} == {len(lines[-1])}, "columns are aligned"


def test_a_network_right_after_enabling_is_bit_identical() -> None:
    base, x = resnet18().eval(), torch.randn(2, 3, 64, 64)
    net = copy.deepcopy(base)
    enable_fine_tuning(net, LORA())
    assert torch.equal(net(x), base(x))
    for name, parameter in net.named_parameters():
        if name.endswith("lora_A"):  # Kaiming-uniform with a = sqrt(5) is U(-1/sqrt(n), 1/sqrt(n))
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.8 * bound < parameter.abs().max() <= bound, name
            torch.testing.assert_close(
                parameter.std().item(), bound / math.sqrt(3), rtol=0.2, atol=0.0
            )


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        (LORA, "conv1 fc"),
        (LoRALinearFineTuningStrategy, "fc"),
        (LoRAConvFineTuningStrategy, "conv1"),
    ],
)
def test_lora_takes_the_layers_of_its_name(strategy: Any, layers: str) -> None:
    net = resnet18()
    enable_fine_tuning(net, strategy())
    found = {name.rpartition(".")[0] for name in trainable(net)} & {"conv1", "fc", "bn1"}
    assert found == set(layers.split())


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [({}, 1.0), ({"rank": 4}, 1.0), ({"rank": 4, "lora_alpha": 6}, 1.5),
     ({"rank": 4, "lora_alpha": 6, "use_rslora": True}, 3.0), ({"lora_alpha": -3}, -1.0)],
)  # fmt: skip
def test_the_scaling_is_alpha_over_rank(settings: dict[str, Any], scaling: float) -> None:
    net = nn.Linear(32, 32)
    base = net.weight.detach().clone()
    enabled(net, LORA(**settings))
    assert net.lora_A.shape == (settings.get("rank", 3), 32)
    torch.testing.assert_close(net.weight - base, scaling * (net.lora_B @ net.lora_A))


# --- the classic ones --------------------------------------------------------------------------


def test_full_fine_tuning_trains_everything_and_disabling_gives_the_base_back() -> None:
    net = small()
    net[0][0].weight.requires_grad = False
    before, x = full_state(net), torch.randn(4, 16)
    report = enable_fine_tuning(net, FullFineTuningStrategy())
    assert trainable(net) == [name for name, _ in net.named_parameters()]
    assert report.trainable_before == report.trainable_after - 256
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert full_state(net) != before
    disable_fine_tuning(net)
    assert full_state(net) == before


def test_disabling_never_calls_trained_what_is_the_base() -> None:
    """Whoever unfreezes a weight by hand gets its base value back, or is told that it is gone."""
    net, x = small(), torch.randn(4, 16)
    before = all_bits(net)
    enable_fine_tuning(net, LORA())
    net[2].bias.requires_grad = True
    with pytest.warns(GiftWarning, match="their requires_grad has been set since: 2.bias"):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step(lambda: net(x).square().sum().backward())
    with contextlib.suppress(RuntimeError):  # "it was trained since, its values were not kept"
        disable_fine_tuning(net)
        assert all_bits(net) == before


@pytest.mark.parametrize("statistics", [False, True])
def test_freeze_trains_nothing(statistics: bool) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(8, 4)
    before = all_bits(net)
    enable_fine_tuning(net, FreezeStrategy(statistics))
    assert list(net.parameters()) == trainable(net) == []
    net.train()(x)
    same = {name for name, value in all_bits(net).items() if value == before[name]}
    moving = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(before) - same == (set() if statistics else moving)
    disable_fine_tuning(net)
    assert all_bits(net) == before


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16}  # fmt: skip
TEXT = TINY | {"vocab_size": 40, "max_position_embeddings": 16}

# the network, the head's path, the input, and whether the head must be named
HEADS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...] | None, bool]] = {
    "resnet18": (lambda: resnet18(num_classes=7), "fc", (2, 3, 32, 32), False),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 16, num_classes=7),
        "heads.head", (2, 3, 32, 32), False),
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=7), "classifier.3",
        (2, 3, 32, 32), False),
    "densenet": (
        lambda: torchvision.models.DenseNet(4, (1, 1), 4, num_classes=7), "classifier",
        (2, 3, 32, 32), False),
    "squeezenet": (
        lambda: torchvision.models.squeezenet1_1(num_classes=7), "classifier.1", (2, 3, 64, 64),
        True),
    "timm nfnet": (
        lambda: timm.create_model("test_nfnet", num_classes=7), "head.fc", (2, 3, 32, 32), False),
    "timm vit": (
        lambda: timm.create_model("test_vit", num_classes=7), "head", (2, 3, 160, 160), False),
    "timm convnext": (
        lambda: timm.create_model("test_convnext", num_classes=7), "head.fc", (2, 3, 32, 32),
        False),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**TEXT, num_labels=7)), "classifier", None,
        False),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT, num_labels=7)),
        "classifier.out_proj", None, False),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16,
                             num_labels=7)), "classifier", None, False),
    "gpt2": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2,
                       bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=7)),
        "score", None, False),
    "transformers vit": (
        lambda: ViTForImageClassification(ViTConfig(**TINY, image_size=32, num_labels=7)),
        "classifier", (2, 3, 32, 32), False),
}  # fmt: skip


def logits(net: nn.Module, shape: tuple[int, ...] | None) -> Any:
    if shape is not None:
        result = net(torch.ones(shape))
        return getattr(result, "logits", result)
    return net(input_ids=torch.arange(2, 12).reshape(2, 5)).logits


@pytest.mark.parametrize(("make", "path", "shape", "named"), HEADS.values(), ids=HEADS)
def test_a_head_is_replaced(
    make: Callable[[], nn.Module], path: str, shape: tuple[int, ...] | None, named: bool
) -> None:
    net = make().eval()
    before, old = full_state(net), net.get_submodule(path)
    classes = getattr(net, "num_classes", None)
    report = enable_fine_tuning(net, HeadReplacementStrategy(4, path if named else None))
    assert [(claim.name, claim.class_name) for claim in report.claims] == [
        (path, type(old).__name__)
    ]
    assert trainable(net) == [f"{path}.{name}" for name, _ in old.named_parameters()]
    out = logits(net, shape)
    assert out.shape == (2, 4)
    if isinstance(classes, int):
        assert net.num_classes == 4
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    assert disable_fine_tuning(net).get_submodule(path) is old
    assert full_state(net) == before


def bert(**settings: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**TEXT, **settings)).eval()


class Wrapper(nn.Module):
    """As people write around a model of transformers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = bert(**settings)


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
@pytest.mark.parametrize("by", ["name", "search"])
def test_the_loss_of_a_transformers_model_counts_the_new_classes(wrapped: bool, by: str) -> None:
    net: Any = Wrapper() if wrapped else bert()
    model = net.model if wrapped else net
    config = model.config
    path = "model.classifier" if wrapped else "classifier"
    enable_fine_tuning(net, HeadReplacementStrategy(5, path if by == "name" else None))
    tokens, labels = torch.arange(20).reshape(4, 5), torch.tensor([4, 0, 3, 2])
    output = model(input_ids=tokens, labels=labels)
    assert output.logits.shape == (4, 5)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert (model.num_labels, model.config.num_labels) == (5, 5)
    assert (config.num_labels, config.problem_type) == (2, None)
    assert len(model.config.id2label) == 5
    disable_fine_tuning(net)
    assert model.config is config
    assert model.num_labels == 2
    assert model(input_ids=tokens, labels=labels % 2).logits.shape == (4, 2)


def test_a_loss_kind_that_an_earlier_forward_chose_does_not_stay_for_the_new_head() -> None:
    """The library writes ``problem_type`` into the configuration at the first loss."""
    model = bert(num_labels=1)
    model(input_ids=torch.arange(5)[None], labels=torch.tensor([0.5]))
    assert model.config.problem_type == "regression"
    enable_fine_tuning(model, HeadReplacementStrategy(3))
    tokens, labels = torch.arange(10).reshape(2, 5), torch.tensor([2, 0])
    output = model(input_ids=tokens, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))


# --- caps --------------------------------------------------------------------------------------


def test_the_first_cap_that_matches_claims() -> None:
    net = small()
    strategy = FineTuningStrategy(
        [(mc_path("0.0"), ma_freeze()), (mc_type(nn.Linear), ma_train())],
        [(pc_name("bias"), pa_freeze()), (pc_any(), pa_train())],
    )
    report = enable_fine_tuning(net, strategy)
    assert trainable(net) == [
        "0.1.weight", "1.0.weight", "1.0.bias", "1.1.weight", "2.weight", "2.bias"
    ]  # fmt: skip
    assert [(claim.cap, claim.name) for claim in report.claims] == [
        (0, "0.0"), (3, "0.1.weight"), (2, "0.1.bias"), (1, "1.0"), (3, "1.1.weight"),
        (2, "1.1.bias"), (1, "2"),
    ]  # fmt: skip


def test_a_claimed_module_hides_what_is_below_it() -> None:
    """Neither other caps nor parameter caps see inside; the action has the whole subtree."""
    net, asked = small(), []

    def listen(*place: Any) -> bool:
        asked.append(place[2])
        return False

    strategy = FineTuningStrategy(
        [(mc_path("0"), ma_freeze()), (listen, ma_train()), (mc_type(nn.Linear), ma_train())],
        [(pc_any(), pa_train())],
    )
    with pytest.warns(GiftWarning, match="listen.*took nothing"):
        enable_fine_tuning(net, strategy)
    assert trainable(net) == names(net, "1", "2")
    assert asked == ["", "1", "1.0", "1.1", "2"], "parents before children, in order"


def test_the_report_tells_what_became_of_each_module() -> None:
    def without(parent: Any, name: str, *place: Any) -> None:
        parent._modules[name] = None

    net = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("a", "b", "c", "d", "e")})
    caps: list[Any] = [
        (mc_path("a"), without),
        (mc_path("b"), ma_replace(lambda old: nn.Identity())),
        (mc_path("c"), ma_train()),
        (mc_path("d"), ma_freeze()),
        (mc_path("e"), ma_adapt("lora", rank=2)),
    ]
    report = enable_fine_tuning(net, FineTuningStrategy(caps))
    what = {claim.name: claim.what for claim in report.claims}
    assert what.pop("e").startswith("lora(rank=2")
    assert what == {
        "a": "removed", "b": "replaced by Identity", "c": "trained", "d": "frozen"
    }  # fmt: skip
    disable_fine_tuning(net)
    assert isinstance(net["a"], nn.Linear)


@pytest.mark.parametrize("claim", ["the network", "a block", "a parameter"])
def test_an_action_that_does_nothing_keeps_what_it_claims_trainable(claim: str) -> None:
    net = small()
    nothing: Any = lambda *place, **params: None  # noqa: E731
    caps: dict[str, Any] = {
        "the network": {"module_caps": [(lambda parent, *place: parent is None, nothing)]},
        "a block": {"module_caps": [(lambda *place: place[2] == "1", nothing)]},
        "a parameter": {"para_caps": [(lambda *place: place[5] == "bias", nothing)]},
    }[claim]
    enable_fine_tuning(net, FineTuningStrategy(**caps))
    assert (
        trainable(net)
        == {
            "the network": [name for name, _ in net.named_parameters()],
            "a block": names(net, "1"),
            "a parameter": [name for name, _ in net.named_parameters() if name.endswith("bias")],
        }[claim]
    )


def test_checks_and_actions_are_given_the_place_and_the_params() -> None:
    net, seen = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2))}), []

    def note(*place: Any, **params: Any) -> bool:
        seen.append((place, params))
        return place[2] == "a.0"

    layer = net["a"][0]
    enable_fine_tuning(net, FineTuningStrategy([(note, note, {"rank": 2, "x": "y"})]))
    places = [(None, "", "", "ModuleDict", net), (net, "a", "a", "Sequential", net["a"]),
              (net["a"], "0", "a.0", "Linear", layer)]  # fmt: skip
    assert seen == [(place, {}) for place in places] + [(places[2], {"rank": 2, "x": "y"})]

    seen.clear()
    enable_fine_tuning(
        disable_fine_tuning(net), FineTuningStrategy(para_caps=[(note, note, {"x": 1})])
    )
    five = places[2]
    assert [(place[:6], params) for place, params in seen] == [
        ((*five, "weight"), {}), ((*five, "weight"), {"x": 1}),
        ((*five, "bias"), {}), ((*five, "bias"), {"x": 1}),
    ]  # fmt: skip
    assert [place[6] for place, _ in seen[::2]] == [layer.weight, layer.bias]


def test_class_names_are_those_before_any_adaptation() -> None:
    """A module under two names is asked for again after the first name has been adapted."""
    net, seen = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), []
    net[1].twin = net[0]

    def noting(*place: Any) -> bool:
        seen.append(place[3])
        return place[2] == "1"

    strategy = FineTuningStrategy([(mc_path("0"), ma_adapt())], [(noting, pa_train())])
    enable_fine_tuning(net, strategy)
    assert len(seen) >= 2
    assert set(seen) == {"Linear"}
    assert trainable(net)[:2] == ["0.lora_B", "0.lora_A"]
    assert [entry[2] for entry in ModuleIterator(net)] == ["Linear", "Linear"]


# --- strategies of strategies ------------------------------------------------------------------


def test_a_strategy_as_action_is_applied_to_what_the_check_matched() -> None:
    net = small()
    inner = FineTuningStrategy([(mc_type(nn.Linear), ma_adapt("lora", rank=2))],
                               [(pc_name("bias"), pa_train())])  # fmt: skip
    strategy = FineTuningStrategy([(mc_path("1"), inner), (mc_path("2"), FullFineTuningStrategy())])
    report = enable_fine_tuning(net, strategy)
    assert trainable(net) == ["1.0.lora_B", "1.0.lora_A", "1.1.bias", "2.weight", "2.bias"]
    assert [(claim.cap, claim.name) for claim in report.claims] == [
        (0, "1.0"), (0, "1.1.bias"), (1, "2.weight"), (1, "2.bias")]  # fmt: skip
    assert report.unmatched == []


def test_a_strategy_as_action_of_a_parameter_cap() -> None:
    """Its parameter caps decide; what none of them takes is frozen, as in any strategy."""
    net = small()
    inner = FineTuningStrategy(para_caps=[(pc_path("0.0.weight"), pa_adapt("lora", rank=2)),
                                          (pc_path("1.1.weight"), pa_train())])  # fmt: skip
    report = enable_fine_tuning(net, FineTuningStrategy(para_caps=[(pc_name("weight"), inner)]))
    assert [claim.name for claim in report.claims] == ["0.0.weight", "1.1.weight"]
    assert trainable(net) == ["0.0.lora_B", "0.0.lora_A", "1.1.weight"]


def test_strategies_nest_deeper() -> None:
    net = nn.ModuleDict({"a": small(), "b": small()})
    inner = FineTuningStrategy(
        [(mc_path("a.0"), LORA(rank=2))], [(pc_path("a.2.bias"), pa_train())]
    )
    enable_fine_tuning(net, FineTuningStrategy([(mc_name("a"), inner)]))
    assert trainable(net) == ["a.0.0.lora_B", "a.0.0.lora_A", "a.2.bias"]


def test_last_means_last_of_what_the_strategy_is_applied_to() -> None:
    net = nn.ModuleDict({"a": small(), "b": small()})
    last = FineTuningStrategy([(mc_last(1), ma_train())])
    head = HeadReplacementStrategy(5)
    strategy = FineTuningStrategy([(mc_name("a"), head), (mc_name("b"), last)])
    enable_fine_tuning(net, strategy)
    assert trainable(net) == names(net, "a.2", "b.2")
    assert net["a"][2].out_features == 5


def test_merged_strategies_try_their_caps_in_order() -> None:
    net = small()
    head = FineTuningStrategy([(mc_name("2"), ma_train())])
    norms = FineTuningStrategy(para_caps=[(mc_type(nn.LayerNorm), pa_train())])
    more = [(mc_path("1.1"), ma_freeze())]
    merged = merge_strategies([head, LORA(rank=2), norms], more, [(pc_name("bias"), pa_train())])
    assert isinstance(merged, MergedStrategy)
    with pytest.warns(GiftWarning, match="parameter cap 2: pc_name.'bias'. -> pa_train.. took no"):
        enable_fine_tuning(net, merged)
    assert trainable(net) == ["0.0.lora_B", "0.0.lora_A", "0.1.weight", "0.1.bias",
                              "1.0.lora_B", "1.0.lora_A", "2.weight", "2.bias"]  # fmt: skip


class Animal(nn.Module):
    pass


class Dog(Animal):
    pass


@pytest.mark.parametrize(
    ("types", "common"),
    [([(), ()], ()), ([Animal, ()], (Animal,)), ([(), Animal, Dog], (Dog,)),
     ([Dog, Animal], (Dog,)), ([[Animal, nn.Conv2d], [nn.Conv2d, nn.LSTM]], (nn.Conv2d,))],
)  # fmt: skip
def test_merged_strategies_accept_what_each_accepts(types: list[Any], common: Any) -> None:
    parts = [FineTuningStrategy([(mc_any(), ma_train())], constraint_type=t) for t in types]
    assert merge_strategies(parts).constraint_type == common


def test_a_constraint_may_be_a_class_of_any_metaclass() -> None:
    import abc

    class Abstract(nn.Module, abc.ABC):
        pass

    net = Abstract()
    net.layer = nn.Linear(2, 2)
    strategy = FineTuningStrategy([(mc_any(), ma_train())], constraint_type=Abstract)
    enable_fine_tuning(net, strategy)
    assert trainable(net) == ["layer.weight", "layer.bias"]


# --- debug, plan, report -----------------------------------------------------------------------

DEBUGGED = FineTuningStrategy(
    [(mc_path("1"), ma_train()), (mc_type(nn.Linear), ma_adapt("lora", rank=2)),
     (mc_last_linear(), ma_freeze())],
    [(pc_name("bias"), pa_train()), (mc_type(nn.LayerNorm) & pc_name("bias"), pa_freeze())],
)  # fmt: skip


def test_debugging_prints_what_each_check_claims_and_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = small()
    net[2].weight.grad = torch.ones(16, 16)
    before, random = full_state(net), torch.get_rng_state()
    enable_fine_tuning(net, DebugStrategy(DEBUGGED))
    assert full_state(net) == before
    assert torch.equal(torch.get_rng_state(), random)
    starts = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == [
        "module cap 1 claims 0.0 (Linear)",
        "parameter cap 0 claims 0.1.bias (LayerNorm)",
        "parameter cap 1 would also match 0.1.bias (LayerNorm)",
        "module cap 0 claims 1 (Sequential)",
        "module cap 1 claims 2 (Linear)",
        "module cap 2 would also match 2 (Linear)",
    ]
    claims = plan_fine_tuning(net, DEBUGGED).claims
    assert [line.split()[4] for line in starts if "claims" in line] == [c.name for c in claims]


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
@pytest.mark.parametrize("how", ["merged", "as an action", "of a debug"])
def test_debugging_changes_nothing_wherever_it_stands(how: str) -> None:
    """It may refuse to stand there, but must not train what it only looks at."""
    net = small()
    before = full_state(net)
    debug = DebugStrategy(LORA())
    with contextlib.suppress(TypeError, ValueError), contextlib.redirect_stdout(io.StringIO()):
        strategy = {
            "merged": lambda: merge_strategies([debug, FreezeStrategy()]),
            "as an action": lambda: FineTuningStrategy([(mc_path("0"), debug)]),
            "of a debug": lambda: DebugStrategy(debug),
        }[how]()
        enable_fine_tuning(net, strategy)
    assert trainable(net) == [name for name, _ in net.named_parameters()]
    assert full_state(net) == before


def test_the_report_of_debugging_names_the_caps_of_its_strategy() -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        report = enable_fine_tuning(small(), DebugStrategy(DEBUGGED))
    assert "mc_path('1') -> ma_train()" in str(report)
    assert " at 0x" not in str(report)


PLANNED: dict[str, Callable[[], FineTuningStrategy]] = {
    "lora": lambda: LORA(rank=2),
    "full": FullFineTuningStrategy,
    "freeze": FreezeStrategy,
    "frozen statistics": lambda: FreezeStrategy(statistics=True),
    "head": lambda: HeadReplacementStrategy(4),
    "merged": lambda: merge_strategies([HeadReplacementStrategy(4), LORA(rank=2)]),
    "nested": lambda: FineTuningStrategy([(mc_name("layer4"), LORA(rank=2))]),
    "parameters": lambda: FineTuningStrategy(
        para_caps=[(pc_path(glob="*.conv2.weight"), pa_adapt("lora", rank=2)),
                   (pc_name("bias"), pa_train())]),
    "lambdas": lambda: FineTuningStrategy(
        [(lambda *p: p[1] == "fc", lambda *p: None), (lambda *p: p[3] == "Conv2d", ma_adapt())]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
@pytest.mark.parametrize("make", PLANNED.values(), ids=PLANNED)
def test_a_plan_is_the_report_of_enabling_and_touches_nothing(
    make: Callable[[], FineTuningStrategy],
) -> None:
    net = resnet18(num_classes=10)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    net.layer1.eval()
    net.register_forward_hook(lambda *call: None)
    before, random, strategy = full_state(net), torch.get_rng_state(), make()
    plan = plan_fine_tuning(net, strategy)
    assert full_state(net) == before
    assert torch.equal(torch.get_rng_state(), random)
    report = enable_fine_tuning(net, strategy)
    assert report == plan
    assert str(report) == str(plan)
    assert disable_fine_tuning(net) is net
    assert plan_fine_tuning(net, strategy) == plan


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
def test_a_tied_tensor_counts_for_the_cap_that_took_it_first() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    net["head"].weight = net["words"].weight
    caps = [(mc_name("words"), ma_train()), (mc_name("head"), ma_train())]
    report = enable_fine_tuning(net, FineTuningStrategy(caps))
    assert [(c.name, c.trainable) for c in report.claims] == [("words", 28), ("head", 0)]
    assert report.trainable_after == 28


@pytest.mark.parametrize("make", PLANNED.values(), ids=PLANNED)
def test_a_report_says_what_is_so(make: Callable[[], FineTuningStrategy]) -> None:
    net = resnet18(num_classes=10)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    report = enable_fine_tuning(net, make())
    now = dict(net.named_parameters())
    chosen = {name: p.numel() for name, p in now.items() if p.requires_grad}
    assert (report.total_before, report.trainable_before) == (sum(sizes.values()),) * 2
    assert report.total_after == sum(p.numel() for p in now.values())
    assert report.trainable_after == sum(chosen.values())
    assert sum(claim.trainable for claim in report.claims) == report.trainable_after
    claimed = [claim.name for claim in report.claims]
    assert len(claimed) == len(set(claimed))
    for name in report.frozen:
        assert not now[name].requires_grad
        assert not any(name == c or name.startswith(f"{c}.") for c in claimed)
    for claim in report.claims:
        inside = {n: s for n, s in chosen.items()
                  if claim.name == "" or n == claim.name or n.startswith((f"{claim.name}.",
                                                                          f"{claim.name}_lora"))
                  or (claim.name.endswith(".weight") and "lora" in n
                      and n.startswith(claim.name.removesuffix("weight")))}  # fmt: skip
        assert sum(inside.values()) == claim.trainable, claim
        assert 0 <= claim.cap < len(report.caps)
    text = str(report)
    assert f"{report.trainable_after:,} of {report.total_after:,} parameters" in text
    for line in report.caps:  # but for the one that looks for experts, and is not missed
        assert line in text or "pc_experts()" in line
    assert len(report.details().splitlines()) == 2 + len(report.claims)
    assert summary(net) == report.summary()
    assert [id(p) for p in trainable_parameters(net)] == [id(p) for p in net.parameters()]
    assert len(chosen) == len(list(net.parameters()))


def test_a_long_report_is_cut_and_says_so() -> None:
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(60)))
    report = enable_fine_tuning(net, LORA(rank=1))
    assert "... and 10 more (report.details() lists all)" in str(report)
    assert "59      Linear" in report.details()


# --- construction, files -----------------------------------------------------------------------


@register_strategy
class Custom(FineTuningStrategy):
    """One that a user registers."""

    def __init__(self, rank: int, *, paths: list[str] = ()) -> None:  # type: ignore[assignment]
        self.paths = list(paths)
        super().__init__([(mc_path(*paths), ma_adapt("lora", rank=rank))])


def test_a_new_head_and_full_fine_tuning_are_merged() -> None:
    """Nothing claims the whole network before the head is found."""
    net = small()
    total = sum(p.numel() for p in net.parameters())
    old = net[-1]
    strategy = merge_strategies([HeadReplacementStrategy(num_classes=7), FullFineTuningStrategy()])
    enable_fine_tuning(net, strategy)
    assert net[-1].out_features == 7
    assert all(p.requires_grad for _, p in net.named_parameters())
    lost = sum(p.numel() for p in old.parameters())
    gained = sum(p.numel() for p in net[-1].parameters())
    assert sum(p.numel() for p in net.parameters()) == total - lost + gained


REGISTERED: dict[str, list[FineTuningStrategy]] = {
    "FineTuningStrategy": [
        FineTuningStrategy([(mc_class_name("Linear"), ma_adapt("lora"), {"rank": 2})]),
        FineTuningStrategy(
            module_caps=[
                (mc_name("1") & ~mc_layer("conv"), LORA(rank=2, lora_alpha=4.5)),
                (mc_last(1) | mc_path(glob="0.*"), ma_train()),
            ],
            para_caps=[(pc_name(regex="bias|gate"), pa_train()),
                       (pc_any(), FineTuningStrategy(para_caps=[(pc_any(), pa_train())]))],
        ),
    ],
    "DetectionHeadStrategy": [DetectionHeadStrategy(4)],
    "SegmentationHeadStrategy": [SegmentationHeadStrategy(4)],
    "RecommendedFineTuningStrategy": [RecommendedFineTuningStrategy()],
    "FullFineTuningStrategy": [FullFineTuningStrategy()],
    "FreezeStrategy": [FreezeStrategy(), FreezeStrategy(statistics=True)],
    "HeadReplacementStrategy": [HeadReplacementStrategy(4), HeadReplacementStrategy(4, "2")],
    **{name: [strategy()] for name, strategy in STRATEGIES.items()},
    "LoRAAllFineTuningStrategy": [LORA(), LORA(2, 4, 0.5, dtype=torch.float64, split_qkv=True)],
    "LoRALinearFineTuningStrategy": [LoRALinearFineTuningStrategy(rank=2, train_bias=True)],
    "LoRAConvFineTuningStrategy": [LoRAConvFineTuningStrategy(conv_layout="out_as_h")],
    "MergedStrategy": [
        merge_strategies([HeadReplacementStrategy(4), LORA(rank=1)], [(mc_any(), ma_freeze())],
                         [(pc_name("bias"), pa_train(), {})]),
    ],
    "DebugStrategy": [DebugStrategy(LORA(rank=2)), DebugStrategy(DebugStrategy(FreezeStrategy()))],
    "BitFitFineTuningStrategy": [BitFitFineTuningStrategy()],
    "NormFineTuningStrategy": [NormFineTuningStrategy(), NormFineTuningStrategy(statistics=False)],
    "ModulesFineTuningStrategy": [ModulesFineTuningStrategy("2", "0.*")],
    "SizedStrategy": [SizedStrategy(LORA(), {
        "0.0": 1, "1.0": 4, "2": 2, "3": 3, "detector.cls_score": 1, "detector.bbox_pred": 2})],
    "BottleneckFineTuningStrategy": [
        BottleneckFineTuningStrategy(4, after="0.*"),
        BottleneckFineTuningStrategy(parallel=True, after=["1", "2"], activation="relu",
                                     scaling=4.0, dtype=torch.float64),
    ],
    "PromptFineTuningStrategy": [
        PromptFineTuningStrategy(at="0"),
        PromptFineTuningStrategy(3, head=True, at=mc_path("1"), strip=False),
    ],
    "PTuningFineTuningStrategy": [
        PTuningFineTuningStrategy(2, at="0"),
        PTuningFineTuningStrategy(3, "lstm", head=True, at="1", encoder_size=4, encoder_layers=1),
    ],
    "LoReFTFineTuningStrategy": [
        LoReFTFineTuningStrategy(2, after="0.0", head=True),
        LoReFTFineTuningStrategy(positions="f2+l1", after=["1", "2"], dropout=0.1),
    ],
    "ResolvedStrategy": [
        ResolvedStrategy(
            [{"method": "lora", "settings": {"rank": 2}, "layout": {"split_qkv": True},
              "tensors": {"0.0.weight": [16, 16], "3.weight": None}},
             {"method": "ia3", "settings": {}, "layout": {}, "tensors": {"1.0.weight": None},
              "biases": {"1.0.bias": None}},
             {"call": "Bottleneck", "settings": {"size": 2}, "modules": {"1": None}}],
            trained=["0.1.bias"], statistics=["3"], heads={"2": 4}),
        ResolvedStrategy(trained=["0.1.weight"]),
        ResolvedStrategy(),
    ],
    "Custom": [Custom(2, paths=["2", "0.0"]), Custom(rank=1, paths=("1.0",))],
}  # fmt: skip


def test_every_registered_strategy_is_tested_here() -> None:
    strategies = {n for n, maker in REGISTRY.items()
                  if isinstance(maker, type) and issubclass(maker, FineTuningStrategy)}  # fmt: skip
    mine = {n for n in strategies if REGISTRY[n].__module__.startswith("gift.")} | {"Custom"}
    mine.remove("ActivatedLoRAFineTuningStrategy")  # tests/test_activated.py: the same
    mine.remove("PrefixFineTuningStrategy")  # tests/test_prefix.py: for language models only
    mine.remove("VisualPromptFineTuningStrategy")  # tests/test_visual_prompts.py
    assert mine == set(REGISTERED)


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
@pytest.mark.parametrize("strategy", [s for some in REGISTERED.values() for s in some], ids=repr)
def test_a_strategy_comes_back_from_its_file(strategy: FineTuningStrategy, tmp_path: Any) -> None:
    path = tmp_path / "strategy.yaml"
    strategy.save_init_paras(path)
    claims, printed = claims_of(strategy)
    assert claims
    for loaded in (
        load_strategy_from_config(path),
        load_strategy_from_config(str(path)),
        load_strategy_from_config(yaml.safe_load(path.read_text())),
        load_strategy_from_config(strategy.to_config()),
        copy.deepcopy(strategy),
    ):
        assert type(loaded) is type(strategy)
        assert loaded.to_config() == strategy.to_config()
        assert claims_of(loaded) == (claims, printed)


def some_of_all() -> nn.Module:
    net = nn.Sequential(*small(), nn.Conv2d(8, 8, 3))
    net.gate = nn.Parameter(torch.ones(2))
    net.detector = FastRCNNPredictor(8, 3)
    return net


def claims_of(strategy: FineTuningStrategy) -> tuple[Any, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        claims = plan_fine_tuning(some_of_all(), strategy).claims
    return [(c.cap, c.name, c.class_name, c.trainable) for c in claims], out.getvalue()


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
@pytest.mark.parametrize("strategy", [s for some in REGISTERED.values() for s in some], ids=repr)
def test_a_delta_fits_the_strategy_from_the_file(strategy: FineTuningStrategy) -> None:
    torch.manual_seed(1)
    net = enabled(some_of_all(), strategy)
    torch.manual_seed(1)
    other = some_of_all()
    enable_fine_tuning(other, load_strategy_from_config(strategy.to_config()))
    other.load_state_dict(net.state_dict())
    assert all_bits(other) == all_bits(net)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"lora_alpha": 3}),
        ({"rank": 4, "lora_alpha": 2, "use_rslora": True}, {"rank": 4}),
        ({"lora_dropout": 0.1}, {}),
        ({"rank": 3, "clip_rank": True}, {}),
        ({"dtype": torch.float32}, {"dtype": "float32"}),
        ({"dtype": "float32"}, {}),
    ],
)
def test_settings_of_the_same_effect_fit_each_others_deltas(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    base = small()
    net, fresh = copy.deepcopy(base), copy.deepcopy(base)
    enabled(net, LORA(**one))
    enabled(fresh, LORA(**other))
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(2, 16)
    torch.testing.assert_close(fresh.eval()(x), net.eval()(x))


def test_a_strategy_remembers_its_construction() -> None:
    strategy = LORA(2, lora_dropout=0.5)
    assert strategy.init_paras["rank"] == 2
    assert strategy.init_paras["lora_dropout"] == 0.5
    assert strategy.init_paras["lora_alpha"] is None, "defaults too"
    assert HeadReplacementStrategy(4).init_paras == {"num_classes": 4, "head_name": None}
    assert Custom(2, paths=["a"]).init_paras == {"rank": 2, "paths": ["a"]}
    caps = [(mc_any(), ma_train())]
    assert FineTuningStrategy(caps).init_paras == FineTuningStrategy(module_caps=caps).init_paras
    assert set(FineTuningStrategy(caps).init_paras) == {
        "module_caps",
        "para_caps",
        "constraint_type",
    }


def test_a_strategy_is_independent_of_what_it_was_made_of() -> None:
    params, paths = {"rank": 2}, ["0.0"]
    caps = [(mc_type(nn.LayerNorm), ma_freeze()), (mc_layer(), ma_adapt("lora"), params)]
    one, custom = FineTuningStrategy(caps), Custom(1, paths=paths)
    caps.clear()
    params["rank"] = 5
    paths.append("1")
    net = enabled(small(), one)
    assert net[2].lora_A.shape == (2, 16)
    assert one.init_paras != {}
    assert custom.init_paras["paths"] == ["0.0"]
    saved = FineTuningStrategy([(mc_layer(), ma_adapt("lora"), params)])
    params["rank"] = 7
    assert load_strategy_from_config(saved.to_config()).module_caps[0].params == {"rank": 5}
    assert saved.module_caps[0].params == {"rank": 5}


def test_a_copy_of_a_strategy_is_independent() -> None:
    strategy = LORA(rank=2)
    twin = copy.deepcopy(strategy)
    twin.register_module_cap(mc_any(), ma_freeze())
    assert len(twin.module_caps) == 2
    assert len(strategy.module_caps) == 1
    assert strategy.to_config() == LORA(rank=2).to_config()


def test_caps_may_come_from_a_generator() -> None:
    strategy = FineTuningStrategy((mc_name(str(i)), ma_train()) for i in range(2))
    assert len(strategy.module_caps) == 2
    loaded = load_strategy_from_config(strategy.to_config())
    assert repr(loaded.module_caps) == repr(strategy.module_caps)


def test_registered_caps_are_tried_after_the_others_and_are_not_saved_silently() -> None:
    net, strategy = small(), FineTuningStrategy([(mc_path("0"), ma_freeze())])
    strategy.register_module_cap(mc_path("0"), ma_train())
    strategy.register_module_cap(mc_layer(), ma_adapt("lora"), {"rank": 2})
    strategy.register_para_cap(pc_name("bias"), pa_train())
    with pytest.warns(GiftWarning, match="module cap 1: mc_path"):
        enable_fine_tuning(net, strategy)
    assert trainable(net) == ["1.0.lora_B", "1.0.lora_A", "1.1.bias", "2.lora_B", "2.lora_A"]
    with pytest.raises(ValueError, match="registered later"):
        strategy.to_config()


def test_a_strategy_does_the_same_to_every_network() -> None:
    """Nothing of the first network stays in it."""
    strategy = merge_strategies([HeadReplacementStrategy(4), LORA(rank=2)])
    first, second = small(), small()
    reports = [enable_fine_tuning(net, strategy) for net in (first, second)]
    assert reports[0] == reports[1]
    assert trainable(first) == trainable(second)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    enable_fine_tuning(nn.Sequential(nn.Conv2d(9, 9, 3), nn.Linear(9, 9)), strategy)


def test_replacing_a_head_by_a_cap_trains_the_rest_as_other_caps_say() -> None:
    net = resnet18(num_classes=10)
    strategy = FineTuningStrategy(
        [(mc_last_linear(), ma_replace_head(4)), (mc_layer(), ma_adapt())]
    )
    enable_fine_tuning(net, strategy)
    assert trainable(net)[-2:] == ["fc.weight", "fc.bias"]
    assert len(trainable(net)) == 2 * 20 + 2
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 4)
