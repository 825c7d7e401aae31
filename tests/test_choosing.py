"""`suggest`: the largest ranks that a budget allows; `table_methods`: what each method costs."""

import copy
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import orthogonal
from torchvision.models import resnet18
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gift import (
    FineTuningStrategy,
    GiftWarning,
    enable_fine_tuning,
    load_strategy_from_config,
    merge_strategies,
    plan_fine_tuning,
    suggest,
)
from gift.core.state_settings import without_settings
from gift.engine.dry_run import on_meta
from gift.factories import (
    ma_adapt,
    ma_train,
    mc_any,
    mc_layer,
    mc_name,
    mc_path,
    mc_type,
    pa_adapt,
    pa_train,
    pc_name,
)
from gift.methods import METHODS, LoRA
from gift.strategies import (
    STRATEGIES,
    BitFitFineTuningStrategy,
    DebugStrategy,
    FreezeStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    SizedStrategy,
    SVDiffAllFineTuningStrategy,
)
from gift.utils.info import compare_methods, table_methods
from tests.common import full_state, trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

LORA = LoRAAllFineTuningStrategy
OTHERS = {
    "bitfit",
    "norm",
    "full",
    "bottleneck",
    "prompt",
    "p_tuning",
    "prefix",
    "visual_prompt",
    "loreft",
}
NO_SUM = ["fact", "glora", "tinylora", "unilora", "vblora"]  # of what single weights cost
SIZED = [name for name, method in METHODS.items()
         if method.size_setting is not None and name not in NO_SUM]  # fmt: skip


def for_all(method: str) -> Any:
    return STRATEGIES[f"{METHODS[method].strategy_prefix}AllFineTuningStrategy"]


def sides(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a weight as LoRA sees it."""
    if isinstance(module, nn.Conv2d):
        o, i, kh, kw = module.weight.shape
        return o * kh, i * kw
    o, i = module.weight.shape
    return o, i


def lora_count(net: nn.Module, ranks: dict[str, int]) -> int:
    """``r * (rows + columns)`` for each layer, by hand."""
    return sum(rank * sum(sides(net.get_submodule(path))) for path, rank in ranks.items())


def trained(net: nn.Module) -> int:
    return sum(p.numel() for _, p in net.named_parameters() if p.requires_grad)


def saved_bytes(net: nn.Module) -> int:
    """Of what is trained, and of buffers, each once; without the bytes that describe settings."""
    state = without_settings(net.state_dict())
    tensors = {tensor.data_ptr(): tensor for tensor in state.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def meta_resnet() -> nn.Module:
    with torch.device("meta"):
        return resnet18()


def small() -> nn.Module:
    """Layers of several kinds, with all that may be odd about a matrix."""
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        nn.Linear(12, 8),
        nn.LSTM(8, 6),
        nn.MultiheadAttention(6, 2),
        nn.Embedding(20, 9),
        nn.Linear(8, 5, bias=False),
    )
    net.norm = nn.LayerNorm(5)
    return net


# --- what a suggestion is worth ----------------------------------------------------------------


@pytest.mark.parametrize("budget", [31_000, 100_000, "1%", "3%"])
def test_ranks_for_a_resnet18_by_hand(budget: Any) -> None:
    net = meta_resnet()
    limit = budget if isinstance(budget, int) else 11_689_512 * int(budget[0]) // 100
    suggestion = suggest(net, budget, LORA())
    layers = {path: m for path, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert list(suggestion.ranks) == list(layers)
    assert suggestion.parameters == lora_count(net, suggestion.ranks) <= limit
    for path, module in layers.items():
        assert suggestion.parameters + sum(sides(module)) > limit, f"{path} could have one more"
    enable_fine_tuning(net, suggestion.strategy)
    assert trained(net) == suggestion.parameters
    for path, rank in suggestion.ranks.items():
        assert net.get_submodule(path).lora_B.shape[-1] == rank


def test_the_same_rank_everywhere_then_one_more_for_the_largest() -> None:
    net = nn.Sequential(*(nn.Linear(i, o) for i, o in [(64, 64), (64, 96), (96, 64), (32, 64)]))
    level = 3 * (128 + 160 + 160 + 96)
    for more, ranks in {0: [3, 3, 3, 3], 160: [3, 4, 3, 3], 320: [3, 4, 4, 3],
                        159: [4, 3, 3, 3], 130: [4, 3, 3, 3], 100: [3, 3, 3, 4],
                        300: [4, 4, 3, 3], 260: [3, 4, 3, 4]}.items():  # fmt: skip
        assert list(suggest(net, level + more, LORA()).ranks.values()) == ranks, more


def test_what_is_too_little_for_a_large_layer_raises_a_small_one_again_and_again() -> None:
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(16, 16))
    assert suggest(net, 2 * (512 + 32) + 3 * 32 + 5, LORA()).ranks == {"0": 2, "1": 5}


def test_what_a_layer_cannot_use_goes_to_the_others() -> None:
    """A layer with one input has rank one, and a delta is not larger than its weight."""
    net = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 16), nn.Linear(16, 64))
    ranks = suggest(net, 17 + 8 * 32 + 11 * 80 + 79, LORA()).ranks
    assert ranks == {"0": 1, "1": 8, "2": 11}
    assert suggest(net, 10**6, LORA()).ranks == {"0": 1, "1": 16 * 16 // 32, "2": 1024 // 80}


def test_a_generous_budget_makes_no_delta_larger_than_its_weight() -> None:
    net = meta_resnet()
    suggestion = suggest(net, "100%", LORA())
    report = plan_fine_tuning(net, suggestion.strategy)
    assert report.larger_than_weight == []
    for path, rank in suggestion.ranks.items():
        module = net.get_submodule(path)
        assert (rank + 1) * sum(sides(module)) > module.weight.numel() or rank == min(sides(module))


def test_a_size_that_adds_nothing_is_not_chosen() -> None:
    """SHiRA of rank 4 trains all 64 elements of a matrix of 8 by 8; rank 8 would be no more."""
    suggestion = suggest(nn.Linear(8, 8), 100, for_all("shira")())
    assert (suggestion.ranks, suggestion.parameters) == ({"": 4}, 64)


def test_a_bert_and_a_llama_by_hand() -> None:
    """With h hidden, m in the middle, v words, k keys and values; norms and biases are frozen."""
    with torch.device("meta"):
        bert = BertForMaskedLM(BertConfig())
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, num_key_value_heads=8))
    h, m = 768, 3072
    each = 12 * (4 * 2 * h + 2 * (h + m)) + 2 * h  # and the dense layer before the tied decoder
    suggestion = suggest(bert, 5 * (each + h + 30522) + 1, LoRALinearFineTuningStrategy())
    assert set(suggestion.ranks.values()) == {5}
    assert suggestion.parameters == 5 * (each + h + 30522)
    h, m, v, k = 4096, 11008, 32000, 8 * 128
    each = 4 * (2 * 2 * h + 2 * (h + k) + 3 * (h + m)) + h + v
    suggestion = suggest(llama, 16 * each, LoRALinearFineTuningStrategy())
    assert set(suggestion.ranks.values()) == {16}
    assert suggestion.parameters == 16 * each
    assert suggestion.megabytes == 16 * each * 4 / 1e6


@pytest.mark.parametrize("budget", ["45%", "8KB"])
@pytest.mark.parametrize("method", SIZED)
def test_a_suggestion_is_what_enabling_gives(method: str, budget: str) -> None:
    """With every method that has a size, also where matrices are tiny."""
    net, setting = small(), METHODS[method].size_setting
    total = sum(p.numel() for p in net.parameters())
    suggestion = suggest(net, budget, for_all(method)())
    report = enable_fine_tuning(net, suggestion.strategy)
    assert suggestion.parameters == trained(net) == report.trainable_after
    assert suggestion.megabytes == saved_bytes(net) / 1e6
    if budget.endswith("%"):
        assert trained(net) <= total * int(budget[:-1]) / 100
    else:
        assert saved_bytes(net) <= int(budget[:-2]) * 1000
    for path, size in suggestion.ranks.items():
        parts = [m for m in net.get_submodule(path).modules() if "_gift_weights" in vars(m)]
        own = [a.method for m in parts for a in m._gift_weights.values() if a.owner is None]
        assert max(getattr(one, str(setting)) for one in own) == size, path


# --- maximal, in random networks ---------------------------------------------------------------


def random_net(seed: int) -> nn.Module:
    choose = random.Random(seed)
    a, b, c, d = (choose.choice([2, 3, 4, 6]) for _ in range(4))
    some = [nn.Linear(a, b), nn.Conv2d(b, c, 2), nn.LSTM(a, a), nn.Embedding(c, d), nn.Linear(1, d)]
    return nn.Sequential(*choose.sample(some, 3), nn.BatchNorm1d(3))


def cost(net: nn.Module, strategy: FineTuningStrategy, in_bytes: bool) -> tuple[int, int]:
    """What a strategy costs, and how many deltas are larger than their weight, by enabling it."""
    own = copy.deepcopy(net)
    report = enable_fine_tuning(own, strategy)
    return saved_bytes(own) if in_bytes else trained(own), len(report.larger_than_weight)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["lora", "hra", "oft", "fourierft", "lora_fa"])
def test_no_layer_could_have_a_larger_size(method: str, seed: int) -> None:
    """The next size of any single layer is impossible, or too expensive, or useless."""
    net, strategy = random_net(seed), for_all(method)()
    choose = random.Random(seed)
    in_bytes = bool(seed % 2)
    if method in ("hra", "oft"):  # which cannot turn a single column
        net = nn.Sequential(*(m for m in net if getattr(m, "in_features", 0) != 1))
    limit = choose.randint(80, 300) * (10 if in_bytes else 1)
    suggestion = suggest(net, f"{limit / 1000}KB" if in_bytes else limit, strategy)
    now, larger = cost(net, suggestion.strategy, in_bytes)
    assert now <= limit
    for path, size in suggestion.ranks.items():
        for next_size in range(size + 1, size + 25):  # no side of a matrix is longer
            raised = SizedStrategy(strategy, suggestion.ranks | {path: next_size})
            try:
                expense, more = cost(net, raised, in_bytes)
            except ValueError:
                continue  # such a size is impossible
            if expense > now:
                assert expense > limit or more > larger, (path, next_size)
                break


@pytest.mark.parametrize("method", SIZED)
def test_the_least_budget_that_an_error_names_is_the_least(method: str) -> None:
    net, strategy = small(), for_all(method)()
    for little in (1, "0.001KB"):
        with pytest.raises(ValueError, match="the least that works is") as caught:
            suggest(net, little, strategy)
        least = re.findall(r"least that works is ([\d._]+)(MB)?", str(caught.value))[0]
        suggestion = suggest(net, "".join(least), strategy)
        number = float(least[0].replace("_", ""))
        assert number == (suggestion.megabytes if least[1] else suggestion.parameters)
        below = f"{number - 1e-6:.6f}MB" if least[1] else int(number) - 1
        with pytest.raises(ValueError, match="the least that works is"):
            suggest(net, below, strategy)


# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100_000", 100_000), ("100000", 100_000), ("100k", 100_000), ("0.1M", 100_000),
        (" 100 K ", 100_000), ("0.0001B", 100_000), (1e5, 100_000), ("1%", 116_895),
        (0.01, 116_895), ("0.5 %", 58_447), (".5%", 58_447),
    ],
)  # fmt: skip
def test_budgets_in_parameters(text: Any, number: int) -> None:
    net = meta_resnet()
    assert suggest(net, text, LORA()).ranks == suggest(net, number, LORA()).ranks


@pytest.mark.parametrize(
    ("text", "size"),
    [("0.5MB", 500_000), ("500kB", 500_000), ("0.0005GB", 500_000), ("500KiB", 512_000),
     ("0.5MiB", 524_288)],
)  # fmt: skip
def test_budgets_in_megabytes_are_of_the_saved_state(text: str, size: int) -> None:
    """BatchNorm's statistics are in it: 9,600 numbers and 20 counters in a ResNet18."""
    net = meta_resnet()
    suggestion = suggest(net, text, LORA())
    assert suggestion.megabytes == (suggestion.parameters * 4 + 9_600 * 4 + 20 * 8) / 1e6
    assert suggestion.ranks == suggest(net, (size - 9_600 * 4 - 20 * 8) // 4, LORA()).ranks


@pytest.mark.parametrize(
    ("budget", "error"),
    [*((wrong, ValueError) for wrong in (0, -5, "", "much", "3 TB", "1,5M", "-1%", 1.5, "_", "0%",
                                         -0.1, float("nan"), float("inf"))),
     *((wrong, TypeError) for wrong in (True, None, [1], 1j))],
)  # fmt: skip
def test_what_is_no_budget_is_refused(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"budget is .*, expected a positive number"):
        suggest(nn.Linear(9, 9), budget, LORA())


@pytest.mark.parametrize(
    ("net", "strategy", "error", "reason"),
    [
        (nn.Linear, LORA(), TypeError, "expected a torch.nn.Module"),
        (nn.Linear(9, 9), LORA, TypeError, "expected a FineTuningStrategy"),
        (nn.Linear(9, 9), DebugStrategy(LORA()), TypeError, "expected a FineTuningStrategy"),
        (nn.Linear(9, 9), FreezeStrategy(), ValueError, "no.* size to choose"),
        (nn.Linear(9, 9), SVDiffAllFineTuningStrategy(), ValueError, "no.* size to choose"),
        (nn.ReLU(), LORA(), ValueError, "matched anything"),
        (nn.LazyLinear(3), LORA(), ValueError, "no shape yet: run a batch"),
    ],
    ids=str,
)
def test_what_has_nothing_to_choose_is_refused(
    net: Any, strategy: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        suggest(net, 1000, strategy)


@pytest.mark.parametrize("method", NO_SUM)
def test_what_layers_share_is_refused(method: str) -> None:
    net = small()
    with pytest.raises(ValueError, match=rf"{method} has parameters that layers share"):
        suggest(net, "45%", for_all(method)())
    assert trained(net) == sum(p.numel() for p in net.parameters())


def test_a_network_that_is_being_fine_tuned_is_refused() -> None:
    net = nn.Linear(9, 9)
    enable_fine_tuning(net, LORA())
    with pytest.raises(RuntimeError, match="already"):
        suggest(net, 1000, LORA())


def test_all_layers_that_fit_no_size_are_named() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(1, 3))
    with pytest.raises(ValueError, match=r"(?s)0: .*one column.*2: .*one column"):
        suggest(net, 1000, for_all("oft")())


def test_weights_of_one_layer_that_share_no_divisor_get_the_nearest() -> None:
    net = nn.LSTM(4, 9)  # 4 and 9 columns
    suggestion = suggest(net, 1000, for_all("oft")())
    assert suggestion.ranks == {"": 9}
    enable_fine_tuning(net, suggestion.strategy)
    assert sum(p.numel() for p in net.parameters()) == 4 * 3 // 2 + 9 * 8 // 2


# --- strategies --------------------------------------------------------------------------------


def two_blocks() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(64, 10))


KEPT: dict[str, tuple[Callable[[], FineTuningStrategy], list[str], int]] = {
    # the strategy, the layers with ranks, and what is trained whatever the ranks are
    "a new head": (
        lambda: merge_strategies([HeadReplacementStrategy(4), LORA()]),
        ["0.0", "1.0"], 4 * 64 + 4),
    "biases": (lambda: LORA(train_bias=True), ["0.0", "1.0", "2"], 64 + 64 + 10),
    "norms' biases": (
        lambda: merge_strategies([LORA(), BitFitFineTuningStrategy()]),
        ["0.0", "1.0", "2"], 64 + 64),
    "a method without size": (
        lambda: merge_strategies(
            [FineTuningStrategy([(mc_name("2"), ma_adapt("svdiff"))]), LORA()]),
        ["0.0", "1.0"], 10),
    "a fixed action": (
        lambda: FineTuningStrategy(
            [(mc_path("0.0"), lambda *place: ma_adapt("lora", rank=2)(*place)),
             (mc_layer(), ma_adapt())]),
        ["1.0", "2"], 2 * 128),
    "one that is trained": (
        lambda: FineTuningStrategy([(mc_path("1"), ma_train()), (mc_layer(), ma_adapt())]),
        ["0.0", "2"], 64 * 64 + 3 * 64),
    "parameters in the cap": (
        lambda: FineTuningStrategy([(mc_layer(), ma_adapt(), {"rank": 9, "train_bias": True})]),
        ["0.0", "1.0", "2"], 64 + 64 + 10),
    "two containers": (
        lambda: FineTuningStrategy([(mc_path("0", "1"), ma_adapt(train_bias=True))],
                                   [(pc_name("bias"), pa_train())]),
        ["0.0", "1.0"], 64 + 64 + 10),
    "a strategy as an action": (
        lambda: FineTuningStrategy([(mc_path("1"), LORA(train_bias=True)),
                                    (mc_type(nn.LayerNorm), ma_train())]),
        ["1.0"], 64 + 128),
    "a parameter": (
        lambda: FineTuningStrategy(
            [(mc_path("2"), ma_adapt())],
            [(pc_name("weight"), pa_adapt(rank=7, clip_rank=True)), (pc_name("bias"), pa_train())]),
        ["0.0.weight", "0.1.weight", "1.0.weight", "1.1.weight", "2"], 4 * 64),
    "a method object": (
        lambda: FineTuningStrategy([(mc_layer(), ma_adapt(LoRA(lora_alpha=8, use_rslora=True)))]),
        ["0.0", "1.0", "2"], 0),
}  # fmt: skip


@pytest.mark.parametrize(("make", "layers", "fixed"), KEPT.values(), ids=KEPT)
def test_the_rest_of_a_strategy_is_kept(
    make: Callable[[], FineTuningStrategy], layers: list[str], fixed: int
) -> None:
    net, strategy = two_blocks(), make()
    suggestion = suggest(net, 1500 + fixed, strategy)
    assert sorted(suggestion.ranks) == layers
    given, made = plan_fine_tuning(net, strategy), plan_fine_tuning(net, suggestion.strategy)
    claims = [(c.cap, c.name, c.class_name) for c in given.claims]
    assert claims == [(c.cap, c.name, c.class_name) for c in made.claims]
    assert made.frozen == given.frozen
    enable_fine_tuning(net, suggestion.strategy)
    new = 0
    for path, rank in suggestion.ranks.items():
        layer = net.get_submodule(path.removesuffix(".weight"))
        assert layer.lora_A.shape[0] == rank
        new += layer.lora_A.numel() + layer.lora_B.numel()
    assert suggestion.parameters == trained(net) == new + fixed
    assert 1500 - 128 < new <= 1500


def test_proportions_are_kept_also_between_methods() -> None:
    """A strategy that gives one layer four times the rank of another means that."""
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256))
    strategy = FineTuningStrategy(
        [(mc_path("0"), ma_adapt(rank=8)), (mc_path("1"), ma_adapt(rank=2)),
         (mc_path("2"), ma_adapt("fourierft", n_frequency=100))]
    )  # fmt: skip
    for factor in (1, 3, 5):
        ranks = suggest(net, factor * (10 * 512 + 100), strategy).ranks
        assert ranks == {"0": 8 * factor, "1": 2 * factor, "2": 100 * factor}


def test_defaults_are_proportions_too() -> None:
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    strategy = FineTuningStrategy([(mc_path("0"), ma_adapt()), (mc_path("1"), ma_adapt("oft"))])
    ranks = suggest(net, 3 * 512 + 256 * 31 // 2, strategy).ranks
    assert ranks == {"0": 3, "1": 32}, "of LoRA three, of OFT blocks of 32"


def test_other_settings_stay() -> None:
    net = nn.Linear(64, 64)
    strategy = LORA(lora_alpha=6, lora_dropout=0.5, dtype=torch.float64, train_bias=True)
    suggestion = suggest(net, 128 * 3 + 64, strategy)
    assert suggestion.ranks == {"": 3}
    enable_fine_tuning(net, suggestion.strategy)
    method = net._gift_weights["weight"].method
    assert (method.rank, method.scaling, method.lora_dropout) == (3, 2.0, 0.5)
    assert net.lora_A.dtype == torch.float64
    assert suggestion.megabytes == (128 * 3 * 8 + 64 * 4) / 1e6


@pytest.mark.parametrize("make", [make for make, *_ in KEPT.values()], ids=KEPT)
def test_a_suggestion_comes_back_from_its_file(
    make: Callable[[], FineTuningStrategy], tmp_path: Any
) -> None:
    strategy, path = make(), tmp_path / "suggestion.yaml"
    suggestion = suggest(two_blocks(), 1500 + 4500, strategy)
    try:
        strategy.to_config()
    except ValueError:  # a lambda, or a method object, can be named by no file
        with pytest.raises(ValueError, match="which a file cannot name"):
            suggestion.strategy.to_config()
        return
    suggestion.strategy.save_init_paras(path)
    for again in (
        load_strategy_from_config(path),
        load_strategy_from_config(yaml.safe_load(path.read_text())),
        copy.deepcopy(suggestion.strategy),
    ):
        net = two_blocks()
        assert enable_fine_tuning(net, again).trainable_after == suggestion.parameters
        assert repr(again) == repr(suggestion.strategy)


def test_a_suggestion_is_for_its_network_alone() -> None:
    suggestion = suggest(two_blocks(), 1500, LORA())
    with pytest.raises(ValueError, match="3: no size is given for it"):
        enable_fine_tuning(nn.Sequential(*two_blocks(), nn.Linear(9, 9)), suggestion.strategy)
    with pytest.raises(TypeError, match="expected a strategy"):
        SizedStrategy(DebugStrategy(LORA()), {})


def test_a_suggestion_may_be_merged() -> None:
    net = two_blocks()
    suggestion = suggest(net, 1500, LORA())
    merged = merge_strategies([HeadReplacementStrategy(3), suggestion.strategy])
    enable_fine_tuning(net, merged)
    assert trained(net) == suggestion.parameters - suggestion.ranks["2"] * 74 + 3 * 64 + 3


def test_a_cap_that_takes_nothing_still_says_so() -> None:
    net = two_blocks()
    strategy = FineTuningStrategy([(mc_layer("conv"), ma_adapt()), (mc_layer(), ma_adapt())])
    suggestion = suggest(net, 1500, strategy)
    with pytest.warns(GiftWarning, match=r"module cap 0: mc_layer\('conv'\)"):
        enable_fine_tuning(net, suggestion.strategy)


# --- networks ----------------------------------------------------------------------------------


def test_tied_layers_have_one_rank() -> None:
    """Large enough that the budget's rest would raise one of the two and not the other."""
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    net = GPT2LMHeadModel(config)
    assert net.lm_head.weight is net.transformer.wte.weight
    for budget in range(700, 2000, 97):
        suggestion = suggest(net, budget, LORA())
        assert suggestion.ranks["lm_head"] == suggestion.ranks["transformer.wte"]
        own = copy.deepcopy(net)
        enable_fine_tuning(own, suggestion.strategy)
        assert trained(own) == suggestion.parameters <= budget


def test_one_layer_under_two_names_counts_once() -> None:
    shared = nn.Linear(16, 16)
    net = nn.Sequential(shared, nn.Linear(16, 16), shared)
    suggestion = suggest(net, 5 * 32 * 2, LORA())
    assert suggestion.ranks == {"0": 5, "1": 5}


def test_a_recurrent_layer_has_one_size_for_its_weights() -> None:
    """The weight of one input has rank one, those of the hidden state may have more."""
    net = nn.LSTM(1, 8)
    suggestion = suggest(net, 33 + 3 * 40, LORA())
    assert suggestion.ranks == {"": 3}
    enable_fine_tuning(net, suggestion.strategy)
    assert [tuple(p.shape) for p in net.parameters()] == [(32, 1), (1, 1), (32, 3), (3, 8)]


def test_computed_weights_and_half_precision() -> None:
    with pytest.warns(FutureWarning):  # of torch: that it is an old way
        old = weight_norm(nn.Linear(16, 16))
    net = nn.Sequential(old, orthogonal(nn.Linear(16, 16)), nn.Linear(16, 16)).bfloat16()
    suggestion = suggest(net, 4 * 32 * 3, LORA())
    assert suggestion.ranks == {"0": 4, "1": 4, "2": 4}
    enable_fine_tuning(net, suggestion.strategy)
    assert trained(net) == suggestion.parameters
    in_base = sum(b.numel() * b.element_size() for b in net.buffers())
    assert saved_bytes(net) == 4 * 32 * 3 * 4 + in_base, "deltas have 32 bits"
    assert suggestion.megabytes == saved_bytes(net) / 1e6


class WithTensors(nn.Module):
    """Tensors wherever they may stand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.layer.weight
        self.register_buffer("statistics", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.plain = torch.zeros(4)
        self.computed = self.layer.weight * 2
        self.listed = [torch.zeros(5), {"key": self.plain}]
        self.hidden = [nn.Parameter(torch.zeros(6)), self.layer.weight]
        self.layer.weight.tag = "kept"


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [t for m in value.modules() for t in tensors(vars(m) | {"_modules": None})]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items for t in tensors(v)] if isinstance(value, dict | list) else []


def test_a_copy_on_meta_has_all_but_the_values() -> None:
    net = WithTensors()
    twin = on_meta(net)
    pairs = list(zip(tensors(net), tensors(twin), strict=True))
    assert len(pairs) == 12
    for mine, theirs in pairs:
        assert theirs.is_meta
        assert not mine.is_meta
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert isinstance(theirs, nn.Parameter) == isinstance(mine, nn.Parameter)
    assert twin.again.weight is twin.layer.weight is twin.hidden[1]
    assert twin.listed[1]["key"] is twin.plain
    assert twin.layer.weight.tag == "kept"
    assert list(twin.state_dict()) == list(net.state_dict())


def test_neither_the_network_nor_the_random_numbers_are_touched() -> None:
    net = nn.Sequential(resnet18(num_classes=4), nn.Dropout())
    net[0].fc.weight.grad = torch.ones_like(net[0].fc.weight)
    before, state = full_state(net), torch.get_rng_state()
    strategy = merge_strategies([HeadReplacementStrategy(4), LORA()])
    assert suggest(net, "1%", strategy).ranks == suggest(net, "1%", strategy).ranks
    table_methods(net)
    table_methods(net, ["lora", "pissa"], budget="1%")
    assert full_state(net) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_copied_is_named() -> None:
    net = nn.Linear(4, 4)
    net.generator = (i for i in range(3))
    with pytest.raises(TypeError) as caught:
        suggest(net, 100, LORA())
    assert "this Linear holds something that cannot be copied" in caught.value.__notes__


# --- how it prints -----------------------------------------------------------------------------


def test_a_suggestion_prints_as_a_table() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 8))
    suggestion = suggest(net, 128 * 4 + 136 * 4, LORA())
    lines = str(suggestion).splitlines()
    assert lines[0] == "1,056 trained parameters, 0.004 MB"
    assert lines[1].split() == ["layer", "weight", "method", "parameters"]
    assert re.split(r"\s{2,}", lines[3]) == ["0", "64 x 64", "lora, rank 4", "512"]
    assert re.split(r"\s{2,}", lines[4]) == ["1", "32 x 64, 32 x 8", "lora, rank 4", "544"]
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(60)))
    suggestion = suggest(deep, 1000, LORA())
    assert "... and 10 more (suggestion.details() lists all)" in str(suggestion)
    assert len(suggestion.details().splitlines()) == 62


# --- the table of methods ----------------------------------------------------------------------


def test_every_method_has_its_row_and_the_fewest_parameters_come_first() -> None:
    rows = compare_methods(meta_resnet())
    assert {row.name for row in rows} == {*METHODS, *OTHERS}
    counts = [row.parameters for row in rows if row.parameters is not None]
    assert counts == sorted(counts)
    known = {row.name: row for row in rows}
    assert known["lora"].parameters == 75_063
    assert known["lora"].tensors == 21
    assert known["lora"].larger == 0
    assert known["lora"].megabytes == (75_063 * 4 + 9_600 * 4 + 20 * 8) / 1e6
    assert known["full"].parameters == 11_689_512
    assert known["full"].share == 1.0
    assert known["full"].tensors == 62
    assert known["norm"].parameters == 9_600
    assert known["bitfit"].parameters == 4_800 + 1_000
    assert known["bitfit"].tensors == 21


@pytest.mark.parametrize("name", [*METHODS, "bitfit", "norm", "full"])
def test_a_row_is_what_enabling_gives(name: str) -> None:
    net = small()
    total = trained(net)
    (row,) = compare_methods(net, [name])
    strategy = for_all(name)() if name in METHODS else {
        "bitfit": BitFitFineTuningStrategy,
        "norm": lambda: FineTuningStrategy([(mc_type(nn.BatchNorm2d, nn.LayerNorm), ma_train())]),
        "full": lambda: FineTuningStrategy([(mc_any(), ma_train())]),
    }[name]()  # fmt: skip
    report = enable_fine_tuning(net, strategy)
    assert row.parameters == trained(net)
    assert row.share == trained(net) / total
    assert row.megabytes == saved_bytes(net) / 1e6
    assert row.larger == len(report.larger_than_weight)
    if name in METHODS:  # a convolution, two linear layers, an embedding; of the LSTM and of the
        assert row.tensors == 4 + 2 + 2  # attention two each
    else:
        assert row.tensors == len(trainable(net))


def test_a_method_that_cannot_be_applied_says_why() -> None:
    net = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(1, 4, bias=False))
    rows = {row.name: row for row in compare_methods(net, ["oft", "bitfit", "lora"])}
    assert next(iter(rows)) == "lora"
    assert rows["oft"].parameters is rows["bitfit"].megabytes is None
    assert re.match("0 .*one column.*and 1 more", rows["oft"].note)
    assert "no cap of BitFitFineTuningStrategy matched anything" in rows["bitfit"].note
    lines = table_methods(net, ["oft", "bitfit", "lora"]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["lora", "oft", "bitfit"]
    assert "one column" in lines[3]
    with pytest.raises(ValueError, match=r"unknown method 'loar'.*closest: .*lora"):
        table_methods(net, ["loar"])


def test_methods_at_a_similar_budget() -> None:
    net = meta_resnet()
    rows = {row.name: row for row in compare_methods(net, ["lora", "hra", "svdiff"], "1%")}
    for name in ("lora", "hra"):
        suggestion = suggest(net, "1%", for_all(name)())
        sizes = suggestion.ranks.values()
        assert rows[name].parameters == suggestion.parameters <= 116_895
        assert rows[name].megabytes == suggestion.megabytes
        assert rows[name].note == f"rank {min(sizes)} to {max(sizes)}"
    assert rows["svdiff"].note == ""
    assert rows["svdiff"].parameters == sum(
        min(m.weight.shape[0], math.prod(m.weight.shape[1:]))
        for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))  # fmt: skip


def test_methods_without_a_weight_are_in_the_table_too() -> None:
    with torch.device("meta"):
        net = BertForMaskedLM(BertConfig())
    known = {row.name: row for row in compare_methods(net, OTHERS)}
    assert known["prompt"].parameters == 8 * 768
    assert known["p_tuning"].parameters == 8 * 768 + 3 * (768 * 768 + 768)
    assert known["prefix"].parameters is None
    assert "its attention is not causal" in known["prefix"].note
    assert known["bottleneck"].parameters == 12 * (2 * 16 * 768 + 16 + 768)
    assert known["prompt"].tensors == known["bottleneck"].tensors == 0
    (row,) = compare_methods(nn.ReLU(), ["prompt"])
    assert row.parameters is None
    assert row.note


def test_deltas_larger_than_their_weight_are_counted() -> None:
    net = nn.Sequential(*(nn.Linear(n, n) for n, _ in zip((2, 4, 64), itertools.count())))
    (row,) = compare_methods(net, ["lora"])
    assert row.larger == 2
    assert row.parameters == 2 * 2 * 2 + 3 * 8 + 3 * 128
