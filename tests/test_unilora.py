"""Uni-LoRA: the projection of a whole network, its start, and PEFT on the same tensors."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import UniLoraConfig, get_peft_model
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.core.weights.record import weight_deltas
from gift.factories import ma_adapt, mc_layer, mc_name
from gift.methods import UniLoRA
from tests.common import full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")
SMALL: dict[str, Any] = {"rank": 3, "theta_d_length": 17}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
D = 3 * ((12 + 8) + (8 + 12) + (12 + 8))


def base(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12), nn.Linear(12, 8)).to(dtype)


def caps(**settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_layer(), ma_adapt("unilora", **SMALL | settings))])


def tuned(net: nn.Module, **settings: Any) -> Any:
    enable_fine_tuning(net, caps(**settings))
    return net


def moved(net: Any, by: float = 0.5) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return net


def layers(net: nn.Module) -> Iterator[Any]:
    return (module for module in net.modules() if weight_deltas(module))


def projection(net: nn.Module) -> Tensor:
    """The matrix `P`, an entry of a factor in each row, in the order of the network."""
    rows = []
    for layer in layers(net):
        for where in (layer.unilora_P_B, layer.unilora_P_A):
            hot = nn.functional.one_hot(where.flatten(), len(layer.unilora_theta)).double()
            rows.append(hot * layer.unilora_norm.double())
    return torch.cat(rows)


@pytest.mark.parametrize("length", [1, 17, 60, D, 61])
def test_the_projection_of_the_network_is_an_isometry(length: int) -> None:
    """Of all layers together: ``P^T P = I``, and each row has one number."""
    net = tuned(base(torch.float64), theta_d_length=length)
    p = projection(net)
    assert p.shape == (D, length)
    assert ((p != 0).sum(1) == 1).all()
    torch.testing.assert_close(p.T @ p, torch.eye(length).double(), rtol=0, atol=1e-12)
    uses = (p != 0).sum(0)
    assert uses.max() - uses.min() <= 1


def test_a_tied_weight_is_one_part() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(9, 12), "body": base(), "head": nn.Linear(12, 9)})
    net["head"].weight = net["words"].weight
    tuned(net)
    found = {path: method(layer) for path, layer in net.named_modules() if weight_deltas(layer)}
    assert {found[path].entries for path in found} == {D + 3 * (9 + 12)}
    assert found["head"] == found["words"]
    assert found["body.0"].first == 3 * (9 + 12)


def test_a_network_with_few_entries_leaves_coordinates_without_use() -> None:
    net = tuned(base(torch.float64), theta_d_length=2 * D)
    p = projection(net)
    used = (p != 0).any(0)
    assert used.sum() == D
    torch.testing.assert_close(p.T @ p, torch.diag(used.double()))


def test_factors_are_the_projection_of_the_vector() -> None:
    """All of them at once, by a dense matrix; the product at the start is subtracted."""
    net = tuned(base(torch.float64))
    frozen = [layer.weight.detach().clone() for layer in layers(net)]
    theta = [net[0].unilora_theta.detach().clone()]
    moved(net)
    theta.append(net[0].unilora_theta.detach())
    products: list[list[Tensor]] = []
    for one in theta:
        entries, found = projection(net) @ one, []
        for layer in layers(net):
            rows, columns = layer.weight.shape
            b, a, entries = entries.tensor_split([rows * 3, (rows + columns) * 3])
            found.append(b.view(rows, 3) @ a.view(3, columns))
        products.append(found)
    for layer, weight, then, now in zip(layers(net), frozen, *products, strict=True):
        assert then.abs().max() > 1e-6
        torch.testing.assert_close(layer.weight.detach(), weight + now - then, rtol=0, atol=1e-12)


def test_layers_have_parts_of_their_own() -> None:
    """Layers of one shape differ, in the order of the network."""
    net = tuned(base(), theta_d_length=50)
    assert not torch.equal(net[0].unilora_P_B, net[3].unilora_P_B)
    assert net[0].unilora_theta is net[2].unilora_theta is net[3].unilora_theta
    assert sum(p.numel() for p in net.parameters()) == 50
    places = [(m.first, m.entries) for layer in layers(net) for m in [method(layer)]]
    assert places == [(0, D), (60, D), (120, D)]


def method(layer: nn.Module) -> Any:
    return weight_deltas(layer)["weight"].method


def test_tied_tensors_are_one_part() -> None:
    net = base()
    net[3].weight = net[0].weight
    tuned(net)
    assert method(net[0]).entries == D - 60
    assert method(net[3]) == method(net[0])
    output = net(X)
    assert not torch.equal(moved(net)(X), output)
    assert torch.equal(net[3].weight, net[0].weight)


def test_parts_with_several_settings_share_as_far_as_they_start_alike() -> None:
    net = base()
    output = net(X)
    strategy = FineTuningStrategy(
        [
            (mc_name("0"), ma_adapt("unilora", **SMALL)),
            (mc_name("2"), ma_adapt("unilora", **SMALL | {"rank": 2})),
            (mc_name("3"), ma_adapt("unilora", **SMALL, seed=1)),
        ]
    )
    enable_fine_tuning(net, strategy)
    assert torch.equal(net(X), output)
    assert net[0].unilora_theta is net[2].unilora_theta is not net[3].unilora_theta
    assert (method(net[2]).first, method(net[2]).entries) == (60, 60 + 40)
    assert (method(net[3]).first, method(net[3]).entries) == (0, None)


def test_files_hold_the_vector_alone_and_states_know_the_place(tmp_path: Path) -> None:
    """And one number of each layer, by which a delta is multiplied."""
    net = moved(tuned(base()))
    gift.save(net, tmp_path / "delta.safetensors")
    assert gift.inspect(tmp_path / "delta.safetensors").parameters == 17 + 3
    fresh = base()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh(X), net(X))
    state = net.state_dict()
    part = nn.Sequential(*base()[:3], nn.Identity())
    tuned(part)
    own = {name: value for name, value in state.items() if name.startswith(("0.", "2."))}
    before = full_state(part)
    with pytest.raises(RuntimeError, match=f"'entries': {D}"):
        part.load_state_dict(own)
    assert full_state(part) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_that_is_cast_starts_exactly_too(dtype: torch.dtype) -> None:
    net, x = tuned(base()).to(dtype), X.to(dtype)
    assert torch.equal(net(x), disable_fine_tuning(copy.deepcopy(net))(x))


def test_a_second_network_does_not_move_the_first() -> None:
    """Buffers that both hold are the same values, and never written."""
    net = moved(tuned(base()))
    output = net(X)
    tuned(nn.Sequential(nn.Linear(12, 8)))
    tuned(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)))
    assert torch.equal(net(X), output)


def test_a_delta_on_top_of_another() -> None:
    net = moved(tuned(base()))
    output = net(X)
    places = [(method(layer).first, method(layer).entries) for layer in layers(net)]
    enable_fine_tuning(net, caps(rank=2), stack=True)
    torch.testing.assert_close(net(X), output)  # the lower delta is part of the weight now
    assert (method(net[3]).first, method(net[3]).entries) == (80, 120)
    assert not torch.equal(moved(net)(X), output)
    disable_fine_tuning(net)
    assert torch.equal(net(X), output)
    assert [(method(layer).first, method(layer).entries) for layer in layers(net)] == places


def test_a_bank_of_deltas_scales_it() -> None:
    net = base(torch.float64)
    frozen = [net[i].weight.detach().clone() for i in (0, 2, 3)]
    bank = gift.DeltaBank(net)
    for name in ("one", "other"):
        bank.add(name, strategy=caps())
        bank.activate(name)
        moved(net)
    before = [net[i].weight.detach().clone() for i in (0, 2, 3)]
    bank.activate("one")
    first = net(X.double())
    bank.scale("other", -1.5)
    assert torch.equal(net(X.double()), first)
    bank.activate("other")
    for i, weight, one in zip((0, 2, 3), frozen, before, strict=True):
        torch.testing.assert_close(net[i].weight, weight - 1.5 * (one - weight), atol=1e-12, rtol=0)


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(12), nn.LazyLinear(8))


def test_a_lazy_network_has_its_projection_after_its_first_batch() -> None:
    net, plain = tuned(lazy()), base()
    net(X)
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net(X), plain(X))
    trained = moved(tuned(base()))
    net.load_state_dict(trained.state_dict())
    assert torch.equal(net(X), trained(X))


def test_a_delta_for_layers_without_a_shape_is_refused() -> None:
    """Before the first batch nothing says how large the network is."""
    net, state = tuned(lazy()), moved(tuned(base())).state_dict()
    with pytest.raises(RuntimeError, match="depends on the shapes of all layers: run a batch"):
        net.load_state_dict(state)
    net(X)
    net.load_state_dict(base().state_dict())
    net.load_state_dict(state)


def test_unilora_is_that_of_peft() -> None:
    """PEFT's delta minus its own start, with PEFT's projection; the gradient as well."""
    plain = base(torch.float64)
    config = UniLoraConfig(r=3, theta_d_length=17, target_modules=["0", "2", "3"])
    theirs = get_peft_model(copy.deepcopy(plain), config).double()
    net = tuned(copy.deepcopy(plain))
    inner = theirs.base_model.model
    pairs = [(net[i], inner[i]) for i in (0, 2, 3)]
    vector = theirs.base_model.unilora_theta_d["default"]
    indices = [
        getattr(other, f"unilora_indices_{k}")["default"] for _, other in pairs for k in "AB"
    ]
    norm = torch.cat([one.flatten() for one in indices]).bincount(minlength=17).double().rsqrt()
    with torch.no_grad():
        for own, other in pairs:
            own.unilora_norm.copy_(norm)
            for key in ("B", "A"):  # PEFT keeps the scale of each entry, in single precision
                index = getattr(other, f"unilora_indices_{key}")["default"]
                getattr(own, f"unilora_P_{key}").copy_(index)
                scales = getattr(other, f"unilora_scales_{key}")
                torch.testing.assert_close(scales["default"], norm[index], rtol=1e-6, atol=0)
                scales["default"] = norm[index]
        vector.copy_(net[0].unilora_theta)
    start = [other.get_delta_weight("default").detach() for _, other in pairs]
    frozen = [own.weight.detach().clone() for own, _ in pairs]
    moved(net)
    with torch.no_grad():
        vector.copy_(net[0].unilora_theta)
    for (own, other), one, first in zip(pairs, frozen, start, strict=True):
        expected = one + other.get_delta_weight("default").detach() - first
        torch.testing.assert_close(own.weight.detach(), expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # their base is moved, so that both networks are one
        for (_, other), first in zip(pairs, start, strict=True):
            other.get_base_layer().weight -= first
    torch.testing.assert_close(net(X.double()), theirs(X.double()), rtol=0, atol=1e-12)
    net(X.double()).square().sum().backward()
    theirs(X.double()).square().sum().backward()
    assert vector.grad.abs().min() > 0
    torch.testing.assert_close(net[0].unilora_theta.grad, vector.grad, rtol=1e-9, atol=1e-12)


def test_a_network_learns_by_one_short_vector() -> None:
    net = tuned(base())
    target = moved(copy.deepcopy(net))(X).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"theta_d_length": 0}, "theta_d_length is 0"),
        ({"init_theta_d_bound": -1.0}, "expected a finite number above zero"),
        ({"first": -1}, "first is -1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniLoRA(**settings)
