"""`DeltaBank.combine`: the sum of deltas, against the sum of what they do to the weights."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import DeltaBank, FineTuningStrategy, GiftWarning, merge_strategies
from gift.bank.combining import _compressed
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_layer, mc_path, pa_adapt, pc_ndim
from gift.strategies import (
    BitFitFineTuningStrategy,
    BottleneckFineTuningStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    NormFineTuningStrategy,
)
from tests.cases.layers import LAYERS, LayerCase
from tests.cases.selection import cells
from tests.common import full_state
from tests.test_bank import unnumbered
from tests.test_every_method import TOKENS, bert
from tests.test_matrix import as_dtype, run

LOW_RANK = ["lora", "rslora", "pissa", "olora", "lora_fa", "vera", "loha"]
NUMBERS = {"a": 0.7, "b": -1.3, "c": 2.0, "d": 0.0}

SMALL = {"rank": 2, "clip_rank": True}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("lora", "pissa", "olora", "lora_fa", "loha", "dora"), SMALL),
    **dict.fromkeys(("delora", "lora_xs", "psoft"), SMALL),
    "rslora": SMALL | {"lora_alpha": 3},
    "vera": {"rank": 3},
    "ia3": {},
    "hra": {"rank": 2},
}


def by(method: str, case: LayerCase | None = None, **settings: Any) -> FineTuningStrategy:
    settings = SETTINGS[method] | settings
    if case is not None and case.caps is not None:
        return FineTuningStrategy([], [(pc_ndim(at_least=1), pa_adapt(method, **settings))])
    return FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))])


def made_of(layer: LayerCase) -> nn.Module:
    net = layer.make().double().eval()
    run(net, layer, as_dtype(layer.inputs(), torch.float64))  # some compute their weight here
    return net


def moved(bank: DeltaBank, std: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in bank.net.parameters():
            parameter += std * torch.randn_like(parameter)


def add(bank: DeltaBank, name: str, strategy: FineTuningStrategy) -> None:
    """A delta as after some training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        bank.add(name, strategy=strategy)
    bank.activate(name)
    moved(bank)
    bank.activate(None)


def weights_of(net: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The tensors as their layers read them."""
    found = {}
    for name in names:
        path, _, own = name.rpartition(".")
        found[name] = getattr(net.get_submodule(path), own).detach().clone()
    return found


def differences(bank: DeltaBank, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """For each delta, what it adds to each of these tensors."""
    bank.activate(None)
    base, made = weights_of(bank.net, names), {}
    for delta in bank.names:
        bank.activate(delta)
        now = weights_of(bank.net, names)
        made[delta] = {name: now[name] - base[name] for name in names}
    bank.activate(None)
    return made


def summed(
    made: dict[str, dict[str, Tensor]], numbers: dict[str, float]
) -> dict[str, Tensor]:  # fmt: skip
    names = next(iter(made.values()))
    return {name: sum(w * made[delta][name] for delta, w in numbers.items()) for name in names}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- exact sums ----------------------------------------------------------------------------------


@cells(
    2,
    methods=[
        ("lora", "loha", "vera", "pissa"),
        ("olora", "rslora", "lora_fa", "lora"),
        ("delora", "lora_xs", "psoft", "lora"),
    ],
    layer=LAYERS,
)
def test_a_sum_without_rank_is_exact(methods: tuple[str, ...], layer: LayerCase) -> None:
    bank = DeltaBank(made_of(layer))
    for name, method in zip(NUMBERS, methods, strict=True):
        add(bank, name, by(method, layer))
    names = list(layer.weights)
    expected = summed(differences(bank, names), NUMBERS)
    report = bank.combine(NUMBERS)
    assert report.error <= 1e-12
    assert all(error <= 1e-12 for error in report.errors.values())
    made = differences(bank, names)["combined"]
    for name in names:
        close(made[name], expected[name])
        assert expected[name].abs().max() > 1e-3
    inputs = as_dtype(layer.inputs(), torch.float64)
    bank.activate("combined")
    assert run(bank.net, layer, inputs).isfinite().all()
    ranks = {n: m._gift_weights[t] for n, m, t in _adapted(bank.net)}
    assert {name: adapter.method.rank for name, adapter in ranks.items()} == report.ranks
    assert all(
        report.ranks[name] <= min(adapter.layout.matrix[-2:]) for name, adapter in ranks.items()
    )


def _adapted(net: nn.Module) -> list[tuple[str, nn.Module, str]]:
    found = []
    for path, module in net.named_modules():
        for tensor in vars(module).get("_gift_weights", {}):
            found.append((f"{path}.{tensor}".lstrip("."), module, tensor))
    return found


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("layouts", [("balanced", "out_as_h"), ("out_as_h", "balanced")], ids=str)
def test_convolutions_in_different_layouts(method: str, layouts: tuple[str, str]) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, (3, 2), groups=2))
    bank = DeltaBank(net.double())
    first = FineTuningStrategy([(mc_layer(), ma_adapt("lora", rank=2, conv_layout=layouts[0]))])
    add(bank, "a", first)
    try:
        second = by(method, conv_layout=layouts[1])
        add(bank, "b", second)
    except (ValueError, AdaptationError):  # which allows one layout only
        add(bank, "b", by(method))
    names = ["0.weight", "1.weight"]
    expected = summed(differences(bank, names), {"a": 2.0, "b": -0.5})
    bank.combine({"a": 2.0, "b": -0.5})
    made = differences(bank, names)["combined"]
    for name in names:
        close(made[name], expected[name])


def test_a_tied_weight_and_a_layer_that_only_one_delta_has() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.token.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(self.token(x))))

    bank = DeltaBank(Net().double())
    add(bank, "a", by("lora"))
    add(bank, "b", FineTuningStrategy([(mc_path("inner"), ma_adapt("lora", rank=4))]))
    add(bank, "c", by("vera"))
    numbers = {"a": 1.5, "b": 0.5, "c": -1.0}
    names = ["token.weight", "inner.weight", "head.weight"]
    expected = summed(differences(bank, names), numbers)
    report = bank.combine(numbers, "sum")
    assert {*report.ranks} == {"token.weight", "inner.weight"}
    made = differences(bank, names)["sum"]
    for name in names:
        close(made[name], expected[name])
    x = torch.randint(0, 11, (2, 5))
    bank.activate("sum")
    with gift.merged(copy.deepcopy(bank.net)) as net:
        close(bank.net(x), net(x))


def test_one_delta_times_a_number_is_its_scaled_self() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    bank, x = DeltaBank(net), torch.randn(3, 6).double()
    add(bank, "a", by("rslora"))
    bank.combine({"a": -2.0})
    bank.scale("a", -2.0)
    outputs = []
    for name in bank.names:
        bank.activate(name)
        outputs.append(net(x))
    close(outputs[0], outputs[1])


# --- approximations ------------------------------------------------------------------------------


def matrices(module: nn.Module, tensor: str, weight: Tensor) -> Tensor:
    """As the combined LoRA sees it; the layout is proven elsewhere."""
    return vars(module)["_gift_weights"][tensor].layout.to_matrix(weight)


@cells(2, terms=[(("dora", "ia3"), 2), (("lora", "loha"), 1), (("hra", "ia3"), 50)], layer=LAYERS)
def test_a_sum_of_a_rank_is_the_truncated_svd(
    terms: tuple[tuple[str, str], int], layer: LayerCase
) -> None:
    """Of each matrix, and the errors that are told are those that are measured."""
    methods, rank = terms
    net = made_of(layer)
    bank = DeltaBank(net)
    try:
        for name, method in zip("ab", methods, strict=True):
            add(bank, name, by(method, layer))
    except AdaptationError:  # a single column cannot be reflected
        assert "hra" in methods
        return
    numbers = {"a": 0.7, "b": -1.3}
    report = bank.combine(numbers, rank=rank)
    names = list(report.ranks)
    assert {*layer.weights} <= {*names}
    made = differences(bank, names)
    expected = summed({name: made[name] for name in numbers}, numbers)
    bank.activate("combined")
    lost, whole = 0.0, 0.0
    for name, module, tensor in _adapted(net):
        dense = matrices(module, tensor, expected[name])
        found = matrices(module, tensor, made["combined"][name])
        u, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
        kept = min(rank, *dense.shape[-2:])
        best = u[..., :, :kept] @ torch.diag_embed(sigma[..., :kept]) @ vh[..., :kept, :]
        close(found, best, 1e-8)
        error = (found - dense).norm() / dense.norm().clamp(min=1e-30)
        assert math.isclose(report.errors[name], error, rel_tol=1e-6, abs_tol=1e-7)
        lost, whole = lost + (found - dense).norm() ** 2, whole + dense.norm() ** 2
    assert math.isclose(report.error, math.sqrt(lost / whole), rel_tol=1e-6, abs_tol=1e-7)
    assert "all" in str(report)


def test_biases_that_follow_are_summed_as_well() -> None:
    """IA3 scales a layer's outputs, its bias among them."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Conv1d(5, 4, 1, groups=1)).double()
    bank = DeltaBank(net)
    add(bank, "a", by("ia3"))
    add(bank, "b", by("lora"))
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    expected = summed(differences(bank, names), {"a": 2.0, "b": 1.0})
    bank.combine({"a": 2.0, "b": 1.0}, rank=100)
    made = differences(bank, names)["combined"]
    for name in names:
        assert expected[name].abs().max() > 1e-3
        close(made[name], expected[name])


# --- what is trained as it is --------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


def test_trained_values_and_buffers_are_summed() -> None:
    net = normed()
    bank = DeltaBank(net)
    base = {name: value.clone() for name, value in net.state_dict().items()}
    strategies = {
        "a": BitFitFineTuningStrategy(),
        "b": NormFineTuningStrategy(),
        "c": by("lora"),
        "d": FullFineTuningStrategy(),
    }
    seen = {}
    for name, strategy in strategies.items():
        add(bank, name, strategy)
        bank.activate(name)
        net.train()(torch.randn(8, 6).double())
        seen[name] = weights_of(net, [n for n in base if "num_batches" not in n])
    numbers = {"a": 0.5, "b": 0.25, "c": 0.4, "d": 0.3}
    bank.activate("b")
    report = bank.combine(numbers)
    assert report.ranks == {}  # the weights are trained whole by one of them
    bank.activate("combined")
    now = weights_of(net, list(seen["a"]))
    for name in now:
        close(now[name], base[name] + sum(w * (seen[d][name] - base[name])
                                          for d, w in numbers.items()))  # fmt: skip
    bank.activate(None)
    assert all(torch.equal(value, base[name]) for name, value in net.state_dict().items())


def test_a_sum_trains_what_its_terms_train_whether_or_not_it_has_moved() -> None:
    """Else a later step would leave it frozen, and states of two sums would not fit each other."""
    net, x = normed().eval(), torch.randn(8, 6).double()
    bank = DeltaBank(net)
    bank.add("a", strategy=NormFineTuningStrategy())
    add(bank, "b", by("lora"))
    own = ["1.weight", "1.bias"]
    bank.combine({"a": 1.0, "b": 1.0})
    bank.activate("b")
    expected = net(x)
    bank.activate("combined")
    assert torch.equal(net(x), expected)
    assert {*own} < {name for name, p in net.named_parameters() if p.requires_grad}
    net(x).square().sum().backward()
    assert all(net[1].get_parameter(name).grad.abs().max() > 0 for name in ("weight", "bias"))
    base = net[1].weight.detach().clone()
    with torch.no_grad():
        net[1].weight += 1
    bank.activate(None)
    assert torch.equal(net[1].weight, base)


def test_of_a_weight_that_one_trains_whole_the_change_of_another_is_added_to_it() -> None:
    """Though the first has not moved it."""
    bank = DeltaBank(normed())
    bank.add("a", strategy=FullFineTuningStrategy())
    add(bank, "b", by("lora"))
    names = ["0.weight", "3.weight", "1.weight"]
    expected = differences(bank, names)["b"]
    assert bank.combine({"a": 1.0, "b": 1.0}).ranks == {}
    made = differences(bank, names)["combined"]
    for name in names:
        close(made[name], expected[name])


def test_a_weight_that_one_trains_whole_and_another_adapts_without_factors() -> None:
    bank = DeltaBank(normed())
    add(bank, "a", FullFineTuningStrategy())
    add(bank, "b", by("dora"))
    names = ["0.weight", "0.bias", "3.weight", "1.weight"]
    expected = summed(differences(bank, names), {"a": 1.0, "b": 2.0})
    with pytest.raises(AdaptationError, match=r"0.weight.*give a rank"):
        bank.combine({"a": 1.0, "b": 2.0})
    assert bank.combine({"a": 1.0, "b": 2.0}, rank=1).error == 0
    made = differences(bank, names)["combined"]
    for name in names:
        close(made[name], expected[name])


def test_negative_variances_are_refused() -> None:
    net = normed()
    bank = DeltaBank(net)
    for name in "ab":
        add(bank, name, by("lora"))
        bank.activate(name)
        net.train()(1e-3 * torch.randn(8, 6).double())
    bank.activate("a")
    before = full_state(net)
    with pytest.raises(ValueError, match=r"negative.*1.running_var"):
        bank.combine({"a": 10.0, "b": 10.0})
    assert unnumbered(full_state(net)) == unnumbered(before)
    assert (bank.names, bank.active) == (["a", "b"], "a")


# --- refusals, and what becomes of the result ----------------------------------------------------


def test_what_cannot_be_summed_is_listed() -> None:
    net = bert()
    bank = DeltaBank(net)
    add(bank, "lora", by("lora"))
    add(bank, "bottleneck", BottleneckFineTuningStrategy())
    add(bank, "head", HeadReplacementStrategy(7))
    add(bank, "dora", by("dora"))
    bank.activate("lora")
    before = full_state(net)
    with pytest.raises(AdaptationError) as error:
        bank.combine(dict.fromkeys(bank.names, 1.0))
    text = str(error.value)
    assert "bottleneck: " in text
    assert "is wrapped by" in text
    assert "head: " in text
    assert "was replaced" in text
    assert text.count("give a rank") > 10
    assert unnumbered(full_state(net)) == unnumbered(before)
    assert bank.names == ["lora", "bottleneck", "head", "dora"]


@pytest.mark.parametrize("rank", [None, 3])
def test_a_sum_can_be_saved_loaded_and_trained(rank: int | None, tmp_path: Path) -> None:
    base = bert()
    bank = DeltaBank(copy.deepcopy(base))
    add(bank, "a", by("lora"))
    add(bank, "b", merge_strategies([by("loha"), NormFineTuningStrategy()]))
    bank.combine({"a": 0.5, "b": 0.5}, rank=rank)
    bank.activate("combined")
    output = bank.net(TOKENS).logits
    gift.save(bank.net, tmp_path / "sum")
    fresh = copy.deepcopy(base)
    gift.load(fresh, tmp_path / "sum")
    assert torch.equal(fresh(TOKENS).logits, output)
    fresh(TOKENS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fresh.parameters())


def test_what_a_sum_leaves_zero_can_still_be_trained() -> None:
    bank, x = DeltaBank(nn.Sequential(nn.Linear(6, 5))), torch.randn(3, 6)
    add(bank, "a", by("dora"))
    bank.combine({"a": 0.0}, rank=3)
    bank.activate("combined")
    assert torch.equal(bank.net[0].weight, bank.net[0]._parameters["weight"])
    bank.net(x).square().sum().backward()
    assert bank.net[0].lora_B.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_lower_precision(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    bank = DeltaBank(net)
    for name in "ab":
        add(bank, name, by("lora"))
    factors = {}
    for name in "ab":
        bank.activate(name)
        factors[name] = net[0].lora_B.detach().double() @ net[0].lora_A.detach().double()
        assert net[0].lora_B.dtype == torch.float32
    bank.combine({"a": 2.0, "b": -1.0})
    bank.activate("combined")
    close(net[0].lora_B.double() @ net[0].lora_A.double(), 2 * factors["a"] - factors["b"], 1e-5)


def test_complex_weights() -> None:
    net = nn.Linear(5, 4, dtype=torch.complex128)
    bank = DeltaBank(net)
    for name in "ab":
        add(bank, name, by("lora"))
    for rank in (None, 4):
        expected = summed(differences(bank, ["weight"]), {"a": 2.0, "b": -1.0})["weight"]
        report = bank.combine({"a": 2.0, "b": -1.0}, "sum", rank)
        assert report.error < 1e-12
        close(differences(bank, ["weight"])["sum"]["weight"], expected)
        bank.remove("sum")


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_sums_the_same(kind: str) -> None:
    """`add_weighted_adapter` on the same tensors."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    targets = ["0", "2"]
    peft = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    )
    peft.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    bank = DeltaBank(base)
    settings = {"default": {"rank": 3, "lora_alpha": 6}, "other": {"rank": 2, "lora_alpha": 2}}
    for name, own in settings.items():
        add(bank, name, FineTuningStrategy([(mc_layer(), ma_adapt("lora", **own))]))
        bank.activate(name)
        for path in targets:
            theirs, ours = peft.base_model.model.get_submodule(path), base.get_submodule(path)
            theirs.lora_A[name].weight.data.copy_(ours.lora_A)
            theirs.lora_B[name].weight.data.copy_(ours.lora_B)
    numbers = {"default": 0.8, "other": 0.5}  # PEFT takes roots of them
    rank = {"cat": None, "svd": 2}[kind]
    peft.add_weighted_adapter(
        list(numbers), list(numbers.values()), "sum", kind, svd_rank=rank,
    )  # fmt: skip
    peft.set_adapter("sum")
    bank.combine(numbers, "sum", rank)
    bank.activate("sum")
    x = torch.randn(3, 8)
    close(bank.net(x), peft(x), 1e-4)
    bank.activate("default")
    assert not torch.allclose(bank.net(x), peft(x), rtol=1e-2)


def test_a_sum_leaves_its_terms_as_they_are_whatever_the_base_was_cast_to() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    bank = DeltaBank(net)
    add(bank, "a", by("lora"))
    bank.activate("a")
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: (p, p.detach().clone()) for name, p in net.named_parameters() if "lora" in name}
    bank.activate(None)
    net.float()
    bank.combine({"a": 1.0}, "sum")
    net.double()
    bank.activate("a")
    now = dict(net.named_parameters())
    for name, (parameter, value) in before.items():
        assert now[name] is parameter
        assert torch.equal(parameter, value), f"{name} has the bits that it had"
        assert torch.equal(parameter.grad, torch.ones_like(value))  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{}, {"a": math.nan}, {"a": math.inf}, {"a": "1"}, {"a": None}])
def test_what_is_no_finite_number_is_named(numbers: dict[str, Any]) -> None:
    bank = DeltaBank(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    add(bank, "a", by("lora"))
    before = full_state(bank.net)
    with pytest.raises(ValueError, match=r"expected finite numbers by name, got (none|{'a': )"):
        bank.combine(numbers, "sum")
    assert bank.names == ["a"]
    assert full_state(bank.net) == before


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_rank_of_a_product_does_not_depend_on_its_size(scale: float) -> None:
    """Four terms, two of which are multiples of each other."""
    left, right = torch.randn(8, 4).double() * scale, torch.randn(4, 9).double() * scale
    left[:, 3], right[3] = 2 * left[:, 0], -right[0]
    made_left, made_right, lost = _compressed(left, right, None)
    assert made_left.shape[-1] == made_right.shape[-2] == 3
    expected = left @ right
    torch.testing.assert_close(made_left @ made_right, expected, rtol=1e-10, atol=1e-12 * scale**2)
    assert lost <= (1e-12 * expected.norm()) ** 2


def test_statistics_that_moved_beside_a_delta_belong_to_the_sum() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    bank, x = DeltaBank(net), torch.randn(9, 6).double()
    bank.add("a", strategy=LoRAAllFineTuningStrategy(rank=2))
    bank.activate("a")
    net.train()(3 * x + 1)
    with torch.no_grad():
        net[0].lora_B.normal_()
    expected = net.eval()(x)
    assert not torch.equal(net[1].running_mean, torch.zeros(4).double())
    bank.activate(None)
    assert torch.equal(net[1].running_mean, torch.zeros(4).double())
    bank.combine({"a": 1.0}, name="sum")
    bank.activate("sum")
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
