"""VB-LoRA: what its start is made of, what layers share, and PEFT on the same tensors."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VBLoRAConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gift
from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.core.weights.record import weight_deltas
from gift.factories import ma_adapt, mc_layer, mc_name
from gift.methods import VBLoRA

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")
SMALL = {"rank": 3, "num_vectors": 9, "vector_length": 4, "topk": 3}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def base(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12), nn.Linear(12, 8)).to(dtype)


def tuned(net: nn.Module, **settings: Any) -> Any:
    enable_fine_tuning(
        net, FineTuningStrategy([(mc_layer(), ma_adapt("vblora", **SMALL | settings))])
    )
    return net


def moved(net: Any, by: float = 0.3) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return net


def product(net: Any, name: str, bank: Tensor) -> Tensor:
    """``B A`` of a layer from its logits, by sorting all of them, in float64."""
    layer, factors = net.get_submodule(name), []
    for key in ("B", "A"):
        logits = getattr(layer, f"vblora_logits_{key}").detach().double()
        least = logits.sort(-1).values[..., -3, None]
        weights = torch.where(logits >= least, logits, -math.inf).softmax(-1)
        exact = bank.to(torch.promote_types(bank.dtype, torch.float64))
        factors.append(torch.einsum("xyh,hb->xyb", weights.to(exact.dtype), exact))
    left, right = factors
    return torch.einsum("ptb,tqc->pbqc", left, right).flatten(0, 1).flatten(1)


def test_the_start_is_the_product_of_its_bank_and_logits() -> None:
    """The weight is the frozen one plus the product now, minus the product at the start."""
    net = tuned(base(torch.float64))
    frozen = {name: net.get_submodule(name).weight.clone() for name in "023"}
    bank = net[0].vblora_bank.detach().clone()
    start = {name: product(net, name, bank) for name in "023"}
    assert all(one.abs().max() > 1e-5 for one in start.values())
    moved(net)
    for name, before in frozen.items():
        expected = before + product(net, name, net[0].vblora_bank.detach()) - start[name]
        torch.testing.assert_close(net.get_submodule(name).weight, expected, rtol=0, atol=1e-12)


def test_layers_share_one_bank_and_choose_different_vectors() -> None:
    net = tuned(base())
    assert net[0].vblora_bank is net[2].vblora_bank is net[3].vblora_bank
    assert net[0].vblora_bank0 is net[3].vblora_bank0
    bank = net[0].vblora_bank.detach()
    assert bank.abs().max() <= 0.02
    assert bank.std() == pytest.approx(0.02 / math.sqrt(3), rel=0.3)
    assert not torch.equal(net[0].vblora_chosen_B0, net[3].vblora_chosen_B0)
    sizes = 9 * 4 + 3 * 9 * (2 + 3) * 3
    assert sum(p.numel() for p in net.parameters()) == sizes


def test_parts_with_other_banks_at_the_start_do_not_share() -> None:
    """Both start exactly, so neither can have the bank of the other."""
    net, x = base(), X
    output = net(x)
    caps = [
        (mc_name("0"), ma_adapt("vblora", **SMALL)),
        (mc_name("2"), ma_adapt("vblora", **SMALL, seed=1)),
        (mc_name("3"), ma_adapt("vblora", **SMALL, init_vector_bank_bound=0.5)),
    ]
    enable_fine_tuning(net, FineTuningStrategy(caps))
    assert torch.equal(net(x), output)
    banks = [net[i].vblora_bank for i in (0, 2, 3)]
    assert len({id(bank) for bank in banks}) == 3
    assert not torch.equal(banks[0], banks[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_that_is_cast_starts_exactly_too(dtype: torch.dtype) -> None:
    """Logits that are equal in 16 bits are as equal before, and one of them is always chosen."""
    net = tuned(base(), num_vectors=400, init_logits_std=0.02).to(dtype)
    x = X.to(dtype)
    assert torch.equal(net(x), disable_fine_tuning(copy.deepcopy(net))(x))


def test_the_first_of_equal_logits_are_chosen() -> None:
    net = tuned(base(torch.float64), num_vectors=200)
    with torch.no_grad():
        net[0].vblora_logits_B.zero_()
    method, parameters = weight_deltas(net[0])["weight"].delta_of(net[0])
    left, _ = method.factors(parameters)
    first = net[0].vblora_bank[:3].mean(0)
    torch.testing.assert_close(left, first.repeat(2)[:, None].expand(8, 3))


def test_a_file_describes_the_start(tmp_path: Path) -> None:
    net = moved(tuned(base()))
    gift.save(net, tmp_path / "delta.safetensors")
    torch.manual_seed(99)
    fresh = base()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh(X), net(X))
    merged = copy.deepcopy(net)
    gift.merge(merged)
    torch.testing.assert_close(merged(X), net(X))
    other = tuned(base(), seed=5)
    with pytest.raises(RuntimeError, match="'seed': 5"):
        other.load_state_dict(net.state_dict())


def test_a_bank_of_deltas_scales_it() -> None:
    net = base(torch.float64)
    x, output = X.double(), net(X.double())
    frozen = {name: net.get_submodule(name).weight.clone() for name in "023"}
    bank = gift.DeltaBank(net)
    caps = [(mc_layer(), ma_adapt("vblora", **SMALL))]
    for name in ("one", "other"):
        bank.add(name, strategy=FineTuningStrategy(caps))
        bank.activate(name)
        assert torch.equal(net(x), output)
        moved(net)
    before = {name: net.get_submodule(name).weight.detach().clone() for name in "023"}
    bank.activate("one")
    first = net(x)
    bank.scale("other", -1.5)
    assert torch.equal(net(x), first)
    bank.activate("other")
    for name, weight in frozen.items():
        expected = weight - 1.5 * (before[name] - weight)
        torch.testing.assert_close(net.get_submodule(name).weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_vblora_is_that_of_peft(transposed: bool) -> None:
    """PEFT's delta minus its own start, on the same bank and logits; gradients as well."""
    torch.manual_seed(1)
    layer = Conv1D(8, 12) if transposed else nn.Linear(12, 8)
    plain = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 12)).double()
    config = VBLoRAConfig(
        r=3, num_vectors=9, vector_length=4, topk=3, target_modules=["0", "2"],
        init_vector_bank_bound=0.5, fan_in_fan_out=transposed,
    )  # fmt: skip
    if transposed:
        config.target_modules = ["0"]
    theirs = get_peft_model(copy.deepcopy(plain), config).double()
    names = ["0"] if transposed else ["0", "2"]
    caps = [(mc_name(name), ma_adapt("vblora", **SMALL)) for name in names]
    net = copy.deepcopy(plain)
    enable_fine_tuning(net, FineTuningStrategy(caps))

    def layers() -> list[tuple[Any, Any]]:
        return [(net.get_submodule(n), theirs.base_model.model.get_submodule(n)) for n in names]

    def put() -> None:
        with torch.no_grad():
            for own, other in layers():
                other.vblora_logits_B["default"].copy_(own.vblora_logits_B)
                other.vblora_logits_A["default"].copy_(own.vblora_logits_A)
                other.vblora_vector_bank["default"].copy_(own.vblora_bank)

    put()
    start = [other.get_delta_weight("default").detach() for _, other in layers()]
    frozen = [own.weight.detach().clone() for own, _ in layers()]
    assert all(torch.equal(own.weight, one) for (own, _), one in zip(layers(), frozen, strict=True))
    moved(net)
    put()
    for (own, other), one, first in zip(layers(), frozen, start, strict=True):
        expected = one + other.get_delta_weight("default").detach() - first
        torch.testing.assert_close(own.weight.detach(), expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # their base is moved, so that both networks are one
        for (_, other), first in zip(layers(), start, strict=True):
            other.get_base_layer().weight -= first
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(net(x), theirs(x), rtol=0, atol=1e-12)
    net(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for own, other in layers():
        pairs = [
            (own.vblora_logits_B, other.vblora_logits_B["default"]),
            (own.vblora_logits_A, other.vblora_logits_A["default"]),
            (own.vblora_bank, other.vblora_vector_bank["default"]),
        ]
        for ours, one in pairs:
            assert ours.grad.abs().max() > 1e-4
            torch.testing.assert_close(ours.grad, one.grad, rtol=1e-9, atol=1e-12)


def test_complex_weights() -> None:
    """The vectors are complex, their weights are real."""
    net = nn.Sequential(nn.Linear(12, 8, dtype=torch.complex128))
    x = torch.randn(3, 12, dtype=torch.complex128)
    output, frozen = net(x), net[0].weight.detach().clone()
    tuned(net)
    assert torch.equal(net(x), output)
    start = product(net, "0", net[0].vblora_bank.detach())
    moved(net)
    expected = frozen + product(net, "0", net[0].vblora_bank.detach()) - start
    torch.testing.assert_close(net[0].weight.detach(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x), x @ expected.T + net[0].bias, rtol=0, atol=1e-12)
    net(x).abs().sum().backward()
    assert net[0].vblora_bank.grad.imag.abs().max() > 0
    assert not net[0].vblora_logits_B.is_complex()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 1}, "topk is 1, expected an integer of at least 2"),
        ({"topk": 5, "num_vectors": 4}, "topk is 5, expected at most num_vectors, 4"),
        ({"init_vector_bank_bound": 0}, "expected a finite number above zero"),
        ({"vector_length": 0}, "vector_length is 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VBLoRA(**settings)


def test_a_bank_learns() -> None:
    net = tuned(base())
    target = moved(copy.deepcopy(net), 0.5)(X).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
