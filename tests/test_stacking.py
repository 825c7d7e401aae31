"""A trained delta on top of a frozen one: ``enable_fine_tuning(net, strategy, stack=True)``."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import gift
from gift import methods, strategies
from gift.core.trained import delta_names
from gift.core.weights.record import weight_deltas
from gift.factories import ma_adapt, ma_replace_head, ma_train, mc_path, pa_train, pc_any, pc_name
from gift.strategies import FineTuningStrategy, LoRAAllFineTuningStrategy
from tests.cases.methods import METHODS, MethodCase, Parameters
from tests.common import all_bits, frozen_output, trainable

LoRA = LoRAAllFineTuningStrategy
pytestmark = pytest.mark.filterwarnings("ignore:the delta has more", "ignore:these cannot have")


class Tied(nn.Module):
    """An embedding, tied to the head; a convolution; a norm with statistics; linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.norm(self.conv(self.embed(tokens).mT)).mT
        return self.head(self.down(self.up(x).relu()))


TOKENS = torch.arange(24).reshape(4, 6) % 20


def moved(net: nn.Module, scale: float = 0.3) -> nn.Module:
    """The network as after some training: no trained parameter is where it began."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return net


def stacked(first: FineTuningStrategy, second: FineTuningStrategy, net: Any = None) -> Any:
    """A network with two deltas, and what it computed with the first."""
    net = (Tied() if net is None else net).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gift.GiftWarning)
        gift.enable_fine_tuning(net, first)
        moved(net)
        before = frozen_output(net, TOKENS)
        gift.enable_fine_tuning(net, second, stack=True)
    return net, before


# -------------------------------------------------------------------------------- the formula


def parameters_of(module: nn.Module, names: dict[str, str], leaf: bool) -> Parameters:
    own = {**module._parameters, **module._buffers}
    found = {key: own[name].detach().clone() for key, name in names.items()}
    for value in found.values():
        value.requires_grad = leaf and value.is_floating_point()
    return found


PAIRS = [(lower, "lora_scaled") for lower in METHODS]
PAIRS += [("lora_scaled", upper) for upper in METHODS]
PAIRS += [("dora", "ia3"), ("ia3", "ia3"), ("dora", "dora"), ("vera", "loha"), ("pissa", "vera")]


@pytest.mark.parametrize(("lower", "upper"), PAIRS)
def test_the_weight_is_the_upper_formula_of_the_lower_one(lower: str, upper: str) -> None:
    torch.manual_seed(0)
    below, above = METHODS[lower], METHODS[upper]
    layer = nn.Linear(16, 8).double()
    w0, b0, x = (
        layer.weight.detach().clone(),
        layer.bias.detach().clone(),
        torch.randn(5, 16).double(),
    )
    for number, case in enumerate((below, above)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gift.GiftWarning)
            gift.enable_fine_tuning(layer, _only(case), stack=number > 0)
        moved(layer)
    top = weight_deltas(layer)["weight"]
    assert top.below is not None
    p1 = parameters_of(layer, top.below.names, leaf=False)
    p2 = parameters_of(layer, top.names, leaf=True)
    weight, bias = w0, b0
    for case, p in ((below, p1), (above, p2)):
        if case.adapts_bias:
            bias = case.of_bias(bias[:, None], p, weight)[:, 0]
        weight = case.formula(weight, p)
    expected = x @ weight.mT + bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, weight)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    trained = {key for key, name in top.names.items() if name in dict(layer.named_parameters())}
    for key in trained:
        own = layer._parameters[top.names[key]]
        assert own is not None
        torch.testing.assert_close(own.grad, p2[key].grad)
    assert all(
        p.grad is None for p in layer._parameters.values() if p is not None and not p.requires_grad
    )


def _only(case: MethodCase) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_path(""), ma_adapt(case.method, **case.settings))])


def test_dropout_acts_on_the_upper_delta_alone() -> None:
    layer = nn.Linear(6, 4).double()
    gift.enable_fine_tuning(layer, LoRA(lora_dropout=0.5))
    moved(layer)
    lower = layer.eval().weight.detach().clone()
    gift.enable_fine_tuning(layer, LoRA(lora_dropout=0.5), stack=True)
    moved(layer)
    x = torch.randn(3, 6).double()
    torch.manual_seed(1)
    y = layer.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    change = layer.lora_B_2 @ layer.lora_A_2
    torch.testing.assert_close(y, x @ lower.mT + layer.bias + dropped @ change.mT)


# ----------------------------------------------------------------------- a network, and the ways


STRATEGIES = ("LoRA", "DoRA", "IA3", "PiSSA", "OFT", "VeRA")


@pytest.mark.parametrize("second", STRATEGIES)
@pytest.mark.parametrize("first", STRATEGIES)
def test_a_stack_is_taken_apart_as_it_was_put_together(first: str, second: str) -> None:
    one, other = (getattr(strategies, f"{n}AllFineTuningStrategy")() for n in (first, second))
    plain = Tied().eval()
    kinds, base = [type(m) for m in plain.modules()], all_bits(plain)
    net, before = stacked(one, other, plain)
    names = trainable(net)
    torch.testing.assert_close(net(TOKENS), before, rtol=1e-4, atol=1e-4)
    moved(net)
    after = net(TOKENS).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    assert sorted(names) == sorted(n for n in net.state_dict() if n in names)
    with gift.disabled(net):
        assert torch.equal(frozen_output(net, TOKENS), before)
    assert torch.equal(net(TOKENS), after)
    with gift.merged(net):
        torch.testing.assert_close(net(TOKENS), after, rtol=1e-4, atol=1e-4)
    merged = gift.merge(copy.deepcopy(net))
    torch.testing.assert_close(merged(TOKENS), after, rtol=1e-4, atol=1e-4)
    assert [type(m) for m in merged.modules()] == kinds
    twin = copy.deepcopy(net)
    gift.disable_fine_tuning(twin)
    assert torch.equal(frozen_output(twin, TOKENS), before)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(TOKENS), after)
    gift.disable_fine_tuning(again)
    gift.disable_fine_tuning(again)
    assert all_bits(again) == base
    gift.disable_fine_tuning(net)
    assert torch.equal(frozen_output(net, TOKENS), before)
    gift.disable_fine_tuning(net)
    assert all_bits(net) == base
    assert [type(m) for m in net.modules()] == kinds


def test_three_levels() -> None:
    net, _ = stacked(LoRA(), LoRA())
    moved(net)
    second = net(TOKENS)
    gift.enable_fine_tuning(net, LoRA(rank=1), stack=True)
    moved(net)
    assert trainable(net)[:2] == ["embed.lora_B_3", "embed.lora_A_3"]
    third = net(TOKENS)
    torch.testing.assert_close(gift.merge(copy.deepcopy(net))(TOKENS), third)
    gift.disable_fine_tuning(net)
    assert torch.equal(net(TOKENS), second)


def test_only_the_upper_delta_learns() -> None:
    net, before = stacked(LoRA(), LoRA())
    frozen = {n: p.detach().clone() for n, p in net.named_parameters() if n not in trainable(net)}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net.requires_grad_(True)  # as trainers do
        net(TOKENS).logsumexp(-1).mean().backward()
        optimizer.step()
    assert not torch.allclose(net(TOKENS), before)
    now = dict(net.named_parameters())
    assert "up.lora_A" in frozen
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("place", ["embed", "head"])
def test_a_tied_tensor_has_one_stack_wherever_it_is_adapted(place: str) -> None:
    only = FineTuningStrategy([(mc_path("embed"), ma_adapt("lora"))])
    upper = FineTuningStrategy([(mc_path(place), ma_adapt("lora"))])
    net, before = stacked(only, upper)
    moved(net)
    assert torch.equal(net.embed.weight, net.head.weight)
    assert not torch.equal(net(TOKENS), before)
    twin = copy.deepcopy(net)
    assert torch.equal(twin.embed.weight, twin.head.weight)
    assert torch.equal(twin.embed.weight, net.embed.weight)
    gift.disable_fine_tuning(net)
    assert torch.equal(frozen_output(net, TOKENS), before)
    assert torch.equal(net.embed.weight, net.head.weight)


def test_what_the_first_trained_in_place_is_frozen_unless_the_second_trains_it() -> None:
    first = FineTuningStrategy(
        [(mc_path("up"), ma_adapt("lora", train_bias=True)), (mc_path("norm"), ma_train())]
    )
    second = FineTuningStrategy(
        [(mc_path("down"), ma_adapt("lora"))], [(pc_name("bias"), pa_train())]
    )
    net, before = stacked(first, second)
    assert "norm.weight" not in trainable(net)
    assert "up.bias" in trainable(net)
    moved(net)
    gift.disable_fine_tuning(net)
    assert torch.equal(frozen_output(net, TOKENS), before)


def test_a_cap_for_everything_does_not_train_the_frozen_delta() -> None:
    for second in (
        FineTuningStrategy([], [(pc_any(), pa_train())]),
        FineTuningStrategy([(mc_path("up"), ma_train())]),
    ):
        net, _ = stacked(LoRA(), second)
        assert "up.weight" in trainable(net)
        assert not [name for name in trainable(net) if "lora" in name]


def test_a_new_head_on_a_stack() -> None:
    class Classes(nn.Sequential):
        pass

    net = Classes(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    gift.enable_fine_tuning(net, LoRA())
    moved(net)
    x = torch.randn(3, 6)
    before = net(x)
    second = FineTuningStrategy(
        [(mc_path("2"), ma_replace_head(9)), (mc_path("0"), ma_adapt("lora"))]
    )
    gift.enable_fine_tuning(net, second, stack=True)
    assert net(x).shape == (3, 9)
    gift.disable_fine_tuning(net)
    assert torch.equal(net(x), before)


# ---------------------------------------------------------------------------------------- files


def test_files_of_both_levels(tmp_path: Path) -> None:
    base = Tied()
    net, before = stacked(LoRA(), strategies.DoRAAllFineTuningStrategy(), copy.deepcopy(base))
    moved(net)
    after = net(TOKENS)
    gift.save(net, tmp_path / "second.safetensors")
    gift.disable_fine_tuning(net)
    gift.save(net, tmp_path / "first.safetensors")
    fresh = copy.deepcopy(base).eval()
    with pytest.raises(gift.DeltaFileError, match=r"on top of frozen deltas.*stack=True"):
        gift.load(fresh, tmp_path / "second.safetensors")
    gift.load(fresh, tmp_path / "first.safetensors", train=False)
    assert torch.equal(fresh(TOKENS), before)
    assert not any(p.requires_grad for p in fresh.parameters())
    with pytest.warns(gift.GiftWarning, match="nothing in this Linear is trained"):
        fresh.up.requires_grad_(True)
    assert not any(p.requires_grad for p in nn.Module.parameters(fresh))
    gift.load(fresh, tmp_path / "second.safetensors", stack=True)
    assert torch.equal(fresh(TOKENS), after)
    assert all(p.requires_grad for p in fresh.parameters())
    with torch.no_grad():
        next(p for n, p in fresh.named_parameters() if n == "up.lora_B").add_(1)
    other = copy.deepcopy(base)
    gift.load(other, tmp_path / "first.safetensors")
    moved(other)
    with pytest.raises(gift.DeltaFileError, match="other values"):
        gift.load(other, tmp_path / "second.safetensors", stack=True)
    file = gift.inspect(tmp_path / "second.safetensors")
    assert {name for name, *_ in file.places()} >= {"up.weight"}
    assert file.below
    assert "up.lora_B" in file.base
    assert "up.lora_B_2" in file.tensors


@pytest.mark.parametrize("lower", [
    "adalora", "pissa", "lora_fa", "guided", "deft", "shira", "vera", "svdiff", "tinylora",
])  # fmt: skip
def test_buffers_of_the_lower_delta_belong_to_the_base(lower: str, tmp_path: Path) -> None:
    """Neither the state nor the file of the upper delta has them; a file knows their values."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    below = getattr(strategies, f"{methods.METHODS[lower].strategy_prefix}LinearFineTuningStrategy")
    base = Tied().eval()
    net = copy.deepcopy(base)
    gift.enable_fine_tuning(net, below())
    gift.save(moved(net, 0.1), first)
    own = delta_names(net)
    gift.enable_fine_tuning(net, LoRA(), stack=True)
    gift.save(moved(net, 0.1), second)
    expected = net(TOKENS)
    assert own.isdisjoint(net.state_dict())
    assert own.isdisjoint(gift.inspect(second).tensors)
    fresh = copy.deepcopy(base)
    gift.load(fresh, first, train=False)
    gift.load(fresh, second, stack=True)
    assert torch.equal(fresh(TOKENS), expected)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(TOKENS), expected)
    other = copy.deepcopy(base)
    gift.load(other, first, train=False)
    kept = gift.inspect(first).tensors
    buffers = [b for name, b in other.named_buffers() if name in kept and name in own]
    if buffers:
        buffers[0].logical_not_() if buffers[0].dtype == torch.bool else buffers[0].add_(1)
        with pytest.raises(gift.DeltaFileError, match="other values"):
            gift.load(other, second, stack=True)


def test_another_setting_of_the_lower_delta_is_another_base(tmp_path: Path) -> None:
    base = nn.Linear(6, 4)
    net = copy.deepcopy(base)
    gift.enable_fine_tuning(net, LoRA(rank=2))
    state = moved(net).state_dict()
    gift.enable_fine_tuning(net, LoRA(rank=2), stack=True)
    gift.save(moved(net), tmp_path / "second.safetensors")
    other = copy.deepcopy(base)
    gift.enable_fine_tuning(other, LoRA(rank=2, lora_alpha=8))
    other.load_state_dict(
        {k: v for k, v in state.items() if "settings" not in k}
        | {k: v for k, v in other.state_dict().items() if "settings" in k}
    )
    with pytest.raises(gift.DeltaFileError, match="on top of frozen deltas"):
        gift.load(other, tmp_path / "second.safetensors", stack=True)


def test_state_dict_has_the_upper_delta_alone() -> None:
    net, _ = stacked(LoRA(), LoRA())
    state = {k: v.clone() for k, v in moved(net).state_dict().items()}
    assert not [k for k in state if k.endswith(("lora_A", "lora_B", "weight"))]
    after = net(TOKENS)
    moved(net)
    net.load_state_dict(state)
    assert torch.equal(net(TOKENS), after)


def test_a_reference_shares_the_frozen_delta() -> None:
    net, _ = stacked(LoRA(), LoRA())
    before, expected = gift.reference(net), net(TOKENS)
    moved(net)
    assert torch.equal(before(TOKENS), expected)
    assert before.up.lora_A.data_ptr() == net.up.lora_A.data_ptr()
    assert before.up.lora_A_2.data_ptr() != net.up.lora_A_2.data_ptr()


def test_an_sft_delta_is_the_reference_of_preference_optimisation() -> None:
    net, sft = stacked(LoRA(), LoRA())
    moved(net)
    with gift.disabled(net):
        assert torch.equal(frozen_output(net, TOKENS), sft)
        with torch.no_grad():  # which may take another form
            torch.testing.assert_close(net(TOKENS), sft)


# ------------------------------------------------------------------------------------- refusals


def test_refusals_leave_the_network_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="is not being fine-tuned"):
        gift.enable_fine_tuning(Tied(), LoRA(), stack=True)
    net = Tied()
    gift.enable_fine_tuning(net, LoRA())
    moved(net)
    before, bits = net(TOKENS), all_bits(net)
    with pytest.raises(RuntimeError, match="stack=True"):
        gift.enable_fine_tuning(net, LoRA())
    with pytest.raises(ValueError, match="no cap"):
        gift.enable_fine_tuning(
            net, FineTuningStrategy([(mc_path("none"), ma_adapt("lora"))]), stack=True
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(gift.GiftWarning):
            gift.enable_fine_tuning(net, LoRA(rank=8), stack=True)
    assert all_bits(net) == bits
    assert net.up.lora_A.requires_grad
    assert [n for n, p in net.named_parameters() if p.requires_grad] == trainable(net)
    gift.enable_fine_tuning(net, LoRA(), stack=True)
    gift.disable_fine_tuning(net)
    net.eval()
    assert before.shape == net(TOKENS).shape


def test_a_plan_of_a_stack_is_refused_as_for_any_network_in_fine_tuning() -> None:
    net = Tied()
    gift.enable_fine_tuning(net, LoRA())
    with pytest.raises(RuntimeError, match="already being fine-tuned"):
        gift.plan_fine_tuning(net, LoRA())


@pytest.mark.parametrize("lower", ["SVDiff", "DoRA", "PiSSA"])
def test_a_lower_delta_follows_new_weights_of_the_base(lower: str) -> None:
    """What it derives from the base is derived again, as in a stack on that base."""
    below, x = getattr(strategies, f"{lower}AllFineTuningStrategy")(), torch.randn(3, 8).double()
    old, new = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
    net, fresh = copy.deepcopy(old), copy.deepcopy(new)
    for strategy, stack in ((below, False), (LoRA(), True)):
        gift.enable_fine_tuning(net, strategy, stack=stack)
        moved(net)
        gift.enable_fine_tuning(fresh, strategy, stack=stack)
        fresh.load_state_dict(net.state_dict())
    with pytest.warns(gift.GiftWarning, match="replaced 2 frozen tensors of the base"):
        net.load_state_dict(new.state_dict())
    assert torch.equal(net(x), fresh(x))


def test_pruned_deltas_are_refused() -> None:
    net = nn.Linear(6, 4)
    gift.enable_fine_tuning(net, LoRA())
    prune.l1_unstructured(net, "lora_A", 2)
    with pytest.raises(RuntimeError, match="pruned"):
        gift.enable_fine_tuning(net, LoRA(), stack=True)


def test_low_rank_stacks_compile_to_one_graph() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    gift.enable_fine_tuning(net, LoRA())
    moved(net)
    gift.enable_fine_tuning(net, LoRA(), stack=True)
    moved(net)
    x = torch.randn(3, 8)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 8).to(dtype)
    w0 = layer.weight.detach().double()
    for number in range(2):
        gift.enable_fine_tuning(layer, LoRA(), stack=number > 0)
        moved(layer)
    whole = w0 + layer.lora_B.double() @ layer.lora_A.double()
    whole = whole + layer.lora_B_2.double() @ layer.lora_A_2.double()
    assert torch.equal(layer.weight, whole.to(dtype))


def test_a_weighted_sum_of_deltas_under_a_trained_one() -> None:
    layer = nn.Linear(16, 8).double()
    w0, bank = layer.weight.detach().clone(), gift.DeltaBank(layer)
    changes = {}
    for name in ("a", "b"):
        bank.add(name, strategy=LoRA())
        bank.activate(name)
        moved(layer)
        changes[name] = (layer.lora_B @ layer.lora_A).detach()
    bank.combine({"a": 0.7, "b": -0.3}, name="both")
    bank.activate("both")
    gift.enable_fine_tuning(layer, LoRA(), stack=True)
    moved(layer)
    own = layer.lora_B_2 @ layer.lora_A_2
    torch.testing.assert_close(layer.weight, w0 + 0.7 * changes["a"] - 0.3 * changes["b"] + own)
    with pytest.raises(RuntimeError, match="on top of another"):
        gift.DeltaBank(layer)
    gift.disable_fine_tuning(layer)
    bank.activate(None)
    assert torch.equal(layer.weight, w0)


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(256, 256, bias=False), Conv1D(256, 256)])
def test_a_function_that_multiplies_by_a_weight_has_all_of_it(layer: Any, stack: bool) -> None:
    """As a network does that calls the function itself, with a large batch."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = copy.deepcopy(layer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.fc.weight)

    net, x = Functional().double(), torch.randn(600, 256).double().requires_grad_()
    base = net.fc.weight.detach().clone()
    for upper in (False, True)[: 1 + stack]:
        gift.enable_fine_tuning(net, LoRA(), stack=upper)
        moved(net)
    wanted = [x, *net.parameters()]
    whole = net.fc.weight
    assert not torch.allclose(whole, base)
    expected = torch.autograd.grad((x @ whole.mT).square().sum(), wanted)
    y = net(x)
    torch.testing.assert_close(y, x @ whole.mT, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y.square().sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
