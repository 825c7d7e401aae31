"""Claims are settled per tensor: whatever names it has, it has one fate, or enabling is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gift
from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.core.unfreeze import untrainable
from gift.factories import (
    ma_adapt,
    ma_freeze,
    ma_replace,
    ma_train,
    mc_any,
    mc_path,
    pa_adapt,
    pa_freeze,
    pa_train,
    pc_path,
)
from gift.strategies import (
    DoRAAllFineTuningStrategy,
    FullFineTuningStrategy,
    IA3AllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    ModulesFineTuningStrategy,
    SVDiffAllFineTuningStrategy,
)
from tests.common import full_state, trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning")


class Words(nn.Module):
    """A tied vocabulary, as language models have."""

    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        head = nn.Linear(8, 16, bias=False)
        if head_first:
            self.head = head
        self.table = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = head
        self.head.weight = self.table.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(self.body(self.table(tokens)).tanh())


class Optional(Words):
    """With places for submodules that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("first", None)
        self.register_module("second", None)


def test_places_without_a_module_are_not_tied() -> None:
    net, without = Optional(), Words()
    for one in (net, without):
        enable_fine_tuning(one, LoRALinearFineTuningStrategy(rank=2))
    assert trainable(net) == trainable(without)


def under_two_names() -> nn.Module:
    shared = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    return nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})


def caps(*modules: Any, para: Any = ()) -> FineTuningStrategy:
    return FineTuningStrategy(list(modules), list(para))


def nothing(*place: Any) -> None:
    """An action that does nothing: what it takes is trained."""


R2 = ma_adapt("lora", rank=2)
ACTIONS: dict[str, tuple[Any, Any]] = {  # for modules, and for parameters
    "trained": (ma_train(), pa_train()),
    "frozen": (ma_freeze(), pa_freeze()),
    "by nothing": (nothing, nothing),
    "rank=2": (R2, pa_adapt("lora", rank=2)),
    "rank=3": (ma_adapt("lora", rank=3), pa_adapt("lora", rank=3)),
    "dora": (ma_adapt("dora", rank=2), pa_adapt("dora", rank=2)),
    "svdiff": (ma_adapt("svdiff"), pa_adapt("svdiff")),
}
SAME = [{"trained", "by nothing"}]


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("kinds", ["mm", "mp", "pm", "pp"])
@pytest.mark.parametrize("second", ACTIONS)
@pytest.mark.parametrize("first", ACTIONS)
def test_a_tied_tensor_has_one_fate(first: str, second: str, kinds: str, head_first: bool) -> None:
    """Two caps, for modules or parameters, one for each name: they agree, or both are told."""
    given = {"m": [], "p": []}  # type: dict[str, list[Any]]
    for kind, action, name in zip(kinds, (first, second), ("table", "head"), strict=True):
        check = mc_path(name) if kind == "m" else pc_path(f"{name}.weight")
        given[kind].append((check, ACTIONS[action][kind == "p"]))
    net, strategy = Words(head_first), FineTuningStrategy(given["m"], given["p"])
    before = full_state(net)
    if first == second or {first, second} in SAME:
        enable_fine_tuning(net, strategy)
        assert net.head._parameters["weight"] is net.table._parameters["weight"]
        assert net.table._parameters["weight"].requires_grad == (first in SAME[0])
        return
    with pytest.raises(ValueError, match="one tensor can have one") as caught:
        enable_fine_tuning(net, strategy)
    for word in ("head.weight", "table.weight", *(repr(c) for c in strategy.caps)):
        assert word in str(caught.value)
    assert full_state(net) == before


SHARED: dict[str, FineTuningStrategy] = {
    "a part adapted, the whole trained": caps((mc_path("a.0"), R2), (mc_path("b"), ma_train())),
    "the whole trained, a part adapted": caps((mc_path("a"), ma_train()), (mc_path("b.0"), R2)),
    "ranks": caps((mc_path("a.0"), R2), (mc_path("b.0"), ma_adapt("lora", rank=3))),
    "frozen and trained": caps((mc_path("a"), ma_freeze()), (mc_path("b"), ma_train())),
    "a parameter and the whole": caps(
        (mc_path("b"), ma_freeze()), para=[(pc_path("a.0.weight"), pa_adapt(rank=2))]),
    "the module and a parameter": caps(
        (mc_path("a.0"), R2), para=[(pc_path("b.0.weight"), pa_train())]),
    "ranks of parameters": caps(
        para=[(pc_path("a.0.weight"), pa_adapt(rank=2)),
              (pc_path("b.0.weight"), pa_adapt(rank=3))]),
    "in a strategy": caps((mc_path("a"), caps((mc_any(), ma_train()))), (mc_path("b.0"), R2)),
}  # fmt: skip


@pytest.mark.parametrize("strategy", SHARED.values(), ids=SHARED)
def test_a_module_under_two_names_is_taken_by_one_cap(strategy: FineTuningStrategy) -> None:
    net = under_two_names()
    before = full_state(net)
    with pytest.raises(ValueError, match="can have one") as caught:
        enable_fine_tuning(net, strategy)
    for word in ("a", "b", *(repr(cap) for cap in strategy.caps)):
        assert word in str(caught.value)
    assert full_state(net) == before


def test_a_module_that_is_replaced_is_replaced_under_both_names() -> None:
    net: Any = under_two_names()
    net["d"] = net["c"]
    old = net["a"][0]
    enable_fine_tuning(
        net, caps((mc_path("a"), ma_replace(lambda m: nn.Linear(8, 2))),
                  (mc_path("c"), ma_replace(lambda m: nn.Linear(8, 3)))),
    )  # fmt: skip
    assert net["a"] is net["b"]
    assert net["c"] is net["d"]
    assert (net["a"].out_features, net["c"].out_features) == (2, 3)
    disable_fine_tuning(net)
    assert net["a"] is net["b"]
    assert net["b"][0] is old


AGREED: dict[str, tuple[Callable[[], nn.Module], FineTuningStrategy, list[str]]] = {
    "all": (Words, LoRAAllFineTuningStrategy(rank=2),
            ["table.lora_B", "table.lora_A", "body.lora_B", "body.lora_A"]),
    "nothing takes the table": (
        Words, LoRALinearFineTuningStrategy(rank=2),
        ["body.lora_B", "body.lora_A", "head.lora_B", "head.lora_A"]),
    "one is trained": (Words, ModulesFineTuningStrategy("head"), ["table.weight"]),
    "both, by unlike caps": (
        Words, caps((mc_path("head"), ma_train()), para=[(pc_path("table.weight"), pa_train())]),
        ["table.weight"]),
    "everything": (Words, FullFineTuningStrategy(), ["table.weight", "body.weight", "body.bias"]),
    "a module, all": (under_two_names, LoRAAllFineTuningStrategy(rank=2),
                      ["a.0.lora_B", "a.0.lora_A", "c.lora_B", "c.lora_A"]),
    "a module, one name": (under_two_names, caps((mc_path("b.0"), R2)),
                           ["a.0.lora_B", "a.0.lora_A"]),
    "a module, both": (
        under_two_names,
        caps((mc_path("a.0"), R2), (mc_path("b.0"), ma_adapt("lora", rank=2))),
        ["a.0.lora_B", "a.0.lora_A"]),
    "a bias beside what is adapted": (
        under_two_names, caps((mc_path("a.0"), R2), para=[(pc_path("b.0.bias"), pa_train())]),
        ["a.0.bias", "a.0.lora_B", "a.0.lora_A"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "strategy", "names"), AGREED.values(), ids=AGREED)
def test_claims_that_agree(
    make: Callable[[], nn.Module], strategy: FineTuningStrategy, names: list[str], tmp_path: Path
) -> None:
    base = make()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, strategy)
    assert trainable(net) == names
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = copy.deepcopy(base)
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert trainable(fresh) == names
    for key, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)


# --- methods that are made from a weight -------------------------------------------------------


def test_what_a_delta_is_made_from_is_frozen_under_all_names() -> None:
    net = Words()
    enable_fine_tuning(net, caps((mc_path("head"), ma_adapt("dora", rank=2))))
    for name in ("head.weight", "table.weight"):
        assert "dora" in untrainable(net)[name]
    assert "body.weight" not in untrainable(net)


@pytest.mark.parametrize("strategy", [DoRAAllFineTuningStrategy, SVDiffAllFineTuningStrategy])
def test_saving_refuses_what_loading_would_refuse(strategy: Any, tmp_path: Path) -> None:
    net = Words()
    enable_fine_tuning(net, strategy())
    net.table._parameters["weight"].requires_grad = True
    with pytest.raises(gift.DeltaFileError, match=r"table\.weight.*derived from the frozen values"):
        gift.save(net, tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_action_that_trains_what_its_delta_is_made_from_is_refused() -> None:
    def act(*place: Any) -> None:
        ma_adapt("dora", rank=2)(*place)
        place[4]._parameters["weight"].requires_grad = True

    net = nn.Sequential(nn.Linear(8, 8))
    before = full_state(net)
    with pytest.raises(ValueError, match=r"0\.weight.*dora.*frozen values"):
        enable_fine_tuning(net, caps((mc_path("0"), act)))
    assert full_state(net) == before


class Biased(Words):
    """As BERT's head, whose bias stands beside it as well."""

    def __init__(self, head_first: bool = False) -> None:
        super().__init__(head_first)
        self.bias = nn.Parameter(torch.randn(16))
        self.head.bias = self.bias


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_bias_with_two_names_is_the_same_under_both(head_first: bool, tied: bool) -> None:
    """Whether the weight that it is added to keeps its own delta, or takes that of a table."""
    torch.manual_seed(0)
    net = Biased(head_first)
    if not tied:
        net.head.weight = nn.Parameter(torch.randn(16, 8))
    tokens = torch.arange(8)
    before, bias = net(tokens), net.bias.detach().clone()
    enable_fine_tuning(net, IA3AllFineTuningStrategy())
    assert torch.equal(net(tokens), before)
    assert torch.equal(net.bias, bias)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand_like(parameter))
    assert torch.equal(net.bias, net.head.bias)
    if tied and not head_first:  # the delta is the table's: its columns are scaled, no output is
        assert torch.equal(net.bias, bias)
    else:
        torch.testing.assert_close(net.bias, bias * net.head.ia3_l.flatten())
    hidden = net.body(net.table(tokens)).tanh()
    expected = hidden @ net.head.weight.T + net.bias
    torch.testing.assert_close(net(tokens), expected)
    found = net(tokens)
    with gift.merged(net):
        torch.testing.assert_close(net(tokens), found)
    disable_fine_tuning(net)
    assert torch.equal(net(tokens), before)
    assert net.bias is net.head.bias
