"""LoHa, LoKr, FourierFT, SHiRA and VeRA beside PEFT and LyCORIS, on the same tensors.

Only where those are right: plain padding, no groups, layers that are called. Below that stands what
is their own: how their seeded buffers are drawn, shared and kept.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.functional.general import factorization as factorization_of_lycoris
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import FourierFTConfig, LoHaConfig, LoKrConfig, ShiraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gift import FineTuningStrategy, enable_fine_tuning, suggest
from gift.factories import ma_adapt, mc_layer
from gift.methods import METHODS, FourierFT, LoHa, LoKr, Method, SHiRA, VeRA
from gift.methods.lokr import factorization

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

Parameters = dict[str, nn.Parameter]
DOUBLE = torch.float64


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(DOUBLE)
    yield
    torch.set_default_dtype(torch.float32)


def adapted(net: Any, method: str, **settings: Any) -> Any:
    """A copy of `net`, all layers of which are adapted."""
    net = copy.deepcopy(net)
    enable_fine_tuning(net, FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))]))
    return net


def randomise(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)


def assert_equal(
    ours: nn.Module,
    theirs: Callable[[Tensor], Tensor],
    pairs: list[tuple[nn.Parameter, nn.Parameter]],
    x: Tensor,
    tolerance: float = 1e-9,
) -> None:
    """The same outputs and gradients from the same values; `pairs` are gift's and the other's."""
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.reshape(other.shape))
    trained = sum(p.numel() for p in ours.parameters())
    assert trained == sum(other.numel() for _, other in pairs), "both train as many numbers"
    outputs = []
    for net in (ours, theirs):
        torch.manual_seed(3)  # for dropout
        outputs.append(net(x))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for mine, other in pairs:
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0
        gradient = other.grad.reshape(mine.shape)
        torch.testing.assert_close(mine.grad, gradient, rtol=tolerance, atol=tolerance)


def peft_layer(base: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    """The model of PEFT for a network of one layer, and that layer."""
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    return model, model.base_model.model[0]


def of_peft(layer: Any, prefix: str, names: dict[str, str]) -> Parameters:
    """By gift's names, the parameters of a layer of PEFT."""
    return {mine: getattr(layer, prefix + other)["default"] for mine, other in names.items()}


def of_lycoris(layer: Any, prefix: str, names: dict[str, str]) -> Parameters:
    """By gift's names, the parameters of a module of LyCORIS."""
    return {mine: getattr(layer, prefix + other) for mine, other in names.items()}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(48, 40), (2, 3, 48)),
    "Linear without bias": (lambda: nn.Linear(16, 40, bias=False), (3, 16)),
    "Conv1d": (lambda: nn.Conv1d(16, 24, 3, stride=2, padding=1), (2, 16, 7)),
    "Conv2d": (lambda: nn.Conv2d(16, 24, (3, 2), dilation=2, padding=1), (2, 16, 6, 6)),
    "Conv2d 1x1": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 3, 3)),
}
on_layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)

HADAMARD = {"loha_B1": "w1_a", "loha_A1": "w1_b", "loha_B2": "w2_a", "loha_A2": "w2_b"}


@on_layers
@pytest.mark.parametrize(("rank", "alpha"), [(2, 2), (4, 10.0)])
@pytest.mark.usefixtures("double")
def test_loha(make: Callable[[], nn.Module], shape: tuple[int, ...], rank: int, alpha: Any) -> None:
    base = make()
    config = LoHaConfig(r=rank, alpha=alpha, target_modules=["0"])
    model, layer = peft_layer(base, config)
    wrapped = LohaModule("", other := copy.deepcopy(base), lora_dim=rank, alpha=alpha).double()
    wrapped.apply_to()
    for theirs, parameters in (
        (model, of_peft(layer, "hada_", HADAMARD)),
        (other, of_lycoris(wrapped, "hada_", HADAMARD)),
    ):
        ours = adapted(base, "loha", rank=rank, alpha=alpha)
        randomise(ours)
        pairs = [(getattr(ours, name), other) for name, other in parameters.items()]
        assert_equal(ours, theirs, pairs, torch.randn(shape))


# Factors that divide the channels; the shapes of `w1` and `w2` then leave these as they are.
KRONECKER: dict[str, dict[str, Any]] = {
    "one factor": {"rank": 1, "factor": 2},
    "alpha": {"rank": 1, "factor": 4, "alpha": 7.0},
    "both": {"rank": 1, "factor": 4, "alpha": 3.0, "decompose_both": True},
}


@on_layers
@pytest.mark.parametrize("settings", KRONECKER.values(), ids=KRONECKER)
@pytest.mark.usefixtures("double")
def test_lokr(
    make: Callable[[], nn.Module], shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    base = make()
    rank, factor, both = settings["rank"], settings["factor"], "decompose_both" in settings
    alpha = settings.get("alpha", rank)
    config = LoKrConfig(
        r=rank, alpha=alpha, decompose_factor=factor, decompose_both=both, target_modules=["0"]
    )
    model, layer = peft_layer(base, config)
    wrapped = LokrModule(
        "", other := copy.deepcopy(base), lora_dim=rank, alpha=alpha, factor=factor,
        decompose_both=both,
    ).double()  # fmt: skip
    wrapped.apply_to()
    names = ("w1_a", "w1_b", "w2_a", "w2_b") if both else ("w1", "w2_a", "w2_b")
    for theirs, found in ((model, of_peft), (other, of_lycoris)):
        parameters = found(layer if found is of_peft else wrapped, "lokr_", {n: n for n in names})
        ours = adapted(base, "lokr", **settings)
        randomise(ours)
        pairs = [(getattr(ours, f"lokr_{n}"), other) for n, other in parameters.items()]
        assert_equal(ours, theirs, pairs, torch.randn(shape))


@on_layers
@pytest.mark.usefixtures("double")
def test_lokr_with_full_matrices(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """As LyCORIS, and as PEFT where its rank is too large to decompose anything."""
    base = make()
    config = LoKrConfig(r=60, alpha=60, decompose_factor=4, target_modules=["0"])
    model, layer = peft_layer(base, config)
    other = copy.deepcopy(base)
    wrapped = LokrModule("", other, lora_dim=2, alpha=5, factor=4, full_matrix=True).double()
    wrapped.apply_to()
    names = {"lokr_w1": "w1", "lokr_w2": "w2"}
    theirs = [(other, of_lycoris(wrapped, "lokr_", names))]
    if not isinstance(base, nn.Conv1d):  # whose axes PEFT multiplies with the wrong ones
        theirs.append((model, of_peft(layer, "lokr_", names)))
    for net, parameters in theirs:
        ours = adapted(base, "lokr", full_matrix=True, factor=4)
        randomise(ours)
        pairs = [(getattr(ours, name), other) for name, other in parameters.items()]
        assert_equal(ours, net, pairs, torch.randn(shape))


LYCORIS = {
    "loha": (LohaModule, "hada_", HADAMARD, {}),
    "lokr": (LokrModule, "lokr_", {f"lokr_{n}": n for n in ("w1", "w2_a", "w2_b")}, {}),
    "lokr, both": (
        LokrModule,
        "lokr_",
        {f"lokr_{n}": n for n in ("w1_a", "w1_b", "w2_a", "w2_b")},
        {"decompose_both": True},
    ),
}


@pytest.mark.parametrize(("kind", "prefix", "names", "settings"), LYCORIS.values(), ids=LYCORIS)
def test_factors_start_as_those_of_lycoris(
    kind: Any, prefix: str, names: dict[str, str], settings: dict[str, Any]
) -> None:
    """The same one at zero, the others with the same spread."""
    torch.manual_seed(3)
    base = nn.Linear(1200, 900)
    wrapped = kind("", base, lora_dim=4, alpha=4, **settings)
    ours = adapted(base, "loha" if kind is LohaModule else "lokr", rank=4, **settings)
    for name, theirs in of_lycoris(wrapped, prefix, names).items():
        mine = getattr(ours, name)
        assert mine.shape == theirs.shape
        # at least 120 draws: the spread is known to a tenth
        torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.3, atol=0)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 6, 8, 12, 16, 500])
def test_factorization_is_that_of_lycoris(factor: int) -> None:
    for size in range(1, 400):
        assert factorization(size, factor) == factorization_of_lycoris(size, factor), size


LINEAR: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "Linear": (lambda: nn.Linear(48, 40), False),
    "Conv1D of transformers": (lambda: Conv1D(40, 48), True),
    "Conv1D of transformers, square": (lambda: Conv1D(48, 48), True),
}
on_linear = pytest.mark.parametrize(("make", "transposed"), LINEAR.values(), ids=LINEAR)


@on_linear
@pytest.mark.parametrize("settings", [{}, {"n_frequency": 20, "scaling": 30.0, "seed": 5}])
def test_fourierft(
    make: Callable[[], nn.Module], transposed: bool, settings: dict[str, Any]
) -> None:
    """The same entries, too; PEFT computes in float32 whatever the weight is."""
    base = make()
    given = settings and {
        "n_frequency": settings["n_frequency"],
        "scaling": settings["scaling"],
        "random_loc_seed": settings["seed"],
    }
    config = FourierFTConfig(target_modules=["0"], fan_in_fan_out=transposed, **given)
    model, layer = peft_layer(base, config)
    ours = adapted(base, "fourierft", **settings)
    assert not ours.fourierft_c.any()
    columns = layer.in_features
    assert torch.equal(ours.fourierft_E // columns, layer.indices["default"][0])
    assert torch.equal(ours.fourierft_E % columns, layer.indices["default"][1])
    randomise(ours)
    pairs = [(ours.fourierft_c, layer.fourierft_spectrum["default"])]
    assert_equal(ours, model, pairs, torch.randn(3, 48), tolerance=1e-5)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.usefixtures("double")
def test_shira(seed: int) -> None:
    """The same elements, too."""
    base = nn.Linear(48, 40)
    config = ShiraConfig(r=2, random_seed=seed, target_modules=["0"])
    model, layer = peft_layer(base, config)
    ours = adapted(base, "shira", rank=2, seed=seed)
    rows, columns = layer.shira_indices["default"].long()
    assert torch.equal(ours.shira_M, rows * 48 + columns)
    randomise(ours)
    assert_equal(ours, model, [(ours.shira_S, layer.shira_weight["default"])], torch.randn(3, 48))


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D of transformers"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.usefixtures("double")
def test_vera(transposed: bool, dropout: float) -> None:
    """With PEFT's pair in the place of gift's own: slices of what the largest layer needs."""
    layers = (
        [Conv1D(40, 24), Conv1D(40, 40)] if transposed else [nn.Linear(24, 40), nn.Linear(40, 6)]
    )
    base = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    config = VeraConfig(
        r=8, d_initial=0.3, vera_dropout=dropout, target_modules=["0", "2"],
        fan_in_fan_out=transposed,
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config)
    ours = adapted(base, "vera", rank=8, d_initial=0.3, vera_dropout=dropout)
    pairs = []
    for mine, other in ((ours[i], model.base_model.model[i]) for i in (0, 2)):
        vectors = other.vera_lambda_b["default"], other.vera_lambda_d["default"]
        pairs += zip((mine.vera_b, mine.vera_d), vectors, strict=True)
        assert torch.equal(mine.vera_b, vectors[0])
        assert torch.equal(mine.vera_d, vectors[1])
        mine.vera_A = other.vera_A["default"][:, : other.in_features]
        mine.vera_B = other.vera_B["default"][: other.out_features]
    randomise(ours)
    assert_equal(ours, model, pairs, torch.randn(3, 24))


# What is their own.


def made(method: Method, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a method adds to a matrix, or to several."""
    return method.fit(shape).init_parameters(torch.zeros(shape, dtype=dtype))


def test_layers_of_all_sizes_take_the_leading_part_of_one_pair() -> None:
    """Up to the scale, which is that of Kaiming's draw for the layer's own size."""
    small, large = made(VeRA(rank=8), 5, 60), made(VeRA(rank=8), 70, 300)
    assert torch.equal(small["vera_B"], large["vera_B"][:5])
    leading = large["vera_A"][:, :60] * (300 / 60) ** 0.5
    torch.testing.assert_close(small["vera_A"], leading)


def test_the_pair_is_two_different_uniform_draws_within_the_bounds_of_kaiming() -> None:
    values = made(VeRA(rank=64), 64, 64)
    a, b = values["vera_A"], values["vera_B"]
    bound = torch.nn.init.calculate_gain("relu") * (3 / 64) ** 0.5
    for matrix in (a, b):
        shares = torch.histc(matrix, 8, -bound, bound) / matrix.numel()
        assert shares.sum() == 1, "all within the bounds"
        # 4096 draws: a share of 1/8 has the standard deviation 0.005
        torch.testing.assert_close(shares, torch.full((8,), 1 / 8), rtol=0, atol=0.025)
    for other in (b, b.T):
        correlation = torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.08  # of 4096 independent ones: 0 +- 0.016


SEEDED = {
    "vera": ({"rank": 4}, ["vera_A", "vera_B"]),
    "fourierft": ({"n_frequency": 7}, ["fourierft_E"]),
    "shira": ({"rank": 1}, ["shira_M"]),
}
on_seeded = pytest.mark.parametrize(
    ("method", "settings", "buffers"), [(m, *v) for m, v in SEEDED.items()], ids=SEEDED
)


@on_seeded
def test_seeded_buffers_depend_on_the_seed_and_not_on_the_dtype(
    method: str, settings: dict[str, Any], buffers: list[str]
) -> None:
    def values(dtype: torch.dtype = torch.float32, **more: Any) -> list[Tensor]:
        torch.manual_seed(len(more))
        return [made(METHODS[method](**settings, **more), 9, 7, dtype=dtype)[b] for b in buffers]

    for single, double, others in zip(
        values(seed=1), values(DOUBLE, seed=1), values(seed=2), strict=True
    ):
        assert torch.equal(single.to(double.dtype), double)
        assert not torch.equal(single, others)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def addresses(net: Any, buffers: list[str]) -> list[list[int]]:
    return [[getattr(net[i], name).data_ptr() for name in buffers] for i in (0, 2)]


@on_seeded
def test_layers_share_seeded_buffers_also_in_copies_and_after_a_move(
    method: str, settings: dict[str, Any], buffers: list[str]
) -> None:
    net = adapted(two_layers(), method, **settings)
    moved = copy.deepcopy(net).to(torch.bfloat16)
    for one in (net, copy.deepcopy(net), moved):
        first, second = addresses(one, buffers)
        assert first == second
    assert addresses(copy.deepcopy(net), buffers) != addresses(net, buffers)
    assert not any(name in key for name in buffers for key in net.state_dict())


@on_seeded
def test_who_writes_into_seeded_buffers_spoils_no_other_network(
    method: str, settings: dict[str, Any], buffers: list[str]
) -> None:
    net = adapted(two_layers(), method, **settings)
    values = {name: getattr(net[0], name).clone() for name in buffers}
    for buffer in net.buffers():
        buffer.zero_()
    other = adapted(two_layers(), method, **settings)
    for name, value in values.items():
        assert torch.equal(getattr(other[2], name), value)


@on_seeded
def test_seeded_buffers_go_with_the_last_network_that_has_them(
    method: str, settings: dict[str, Any], buffers: list[str]
) -> None:
    net = adapted(nn.Linear(11, 13), method, **settings)
    held = [weakref.ref(getattr(net, name)) for name in buffers]
    del net
    gc.collect()
    assert [reference() for reference in held] == [None] * len(buffers)


@on_seeded
def test_a_delta_of_another_seed_is_refused(
    method: str, settings: dict[str, Any], buffers: list[str]
) -> None:
    net = adapted(two_layers(), method, seed=1, **settings)
    other = adapted(two_layers(), method, seed=2, **settings)
    with pytest.raises(RuntimeError, match="'seed': 1"):
        other.load_state_dict(net.state_dict())


def test_groups_choose_entries_of_their_own_and_share_one_pair() -> None:
    entries = made(FourierFT(n_frequency=6), 3, 5, 4)["fourierft_E"]
    elements = made(SHiRA(rank=1), 3, 5, 4)["shira_M"]
    for chosen in (entries, elements):
        assert len({tuple(group) for group in chosen.sort().values.tolist()}) == 3
        assert all(len(set(group)) == len(group) for group in chosen.tolist())
    values = made(VeRA(rank=6), 3, 5, 4)
    for name in ("vera_A", "vera_B"):
        assert torch.equal(values[name], made(VeRA(rank=6), 5, 4)[name].expand(3, -1, -1))


def largest(weight: Tensor, count: int) -> list[int]:
    return sorted(np.argsort(-weight.detach().abs().numpy().ravel())[:count].tolist())


def test_shira_by_magnitude_changes_the_largest_elements_and_saves_which() -> None:
    base = nn.Linear(9, 6)
    net = adapted(base, "shira", rank=2, mask="magnitude")
    assert net.shira_M.tolist() == largest(base.weight, 2 * (9 + 6))
    randomise(net)
    changed = (net.weight != base.weight).flatten().nonzero().flatten()
    assert torch.equal(changed, net.shira_M)
    elsewhere = adapted(nn.Linear(9, 6), "shira", rank=2, mask="magnitude")
    elsewhere.load_state_dict(net.state_dict())
    assert torch.equal(elsewhere.shira_M, net.shira_M)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shira_by_magnitude_follows_a_base_that_is_loaded_before_training(device: str) -> None:
    base = nn.Linear(9, 6)
    with torch.device(device):
        late = nn.Linear(9, 6)
    settings = {"rank": 1, "mask": "magnitude"}
    enable_fine_tuning(late, FineTuningStrategy([(mc_layer(), ma_adapt("shira", **settings))]))
    if device == "meta":
        late.to_empty(device="cpu")
    late.load_state_dict(base.state_dict())
    assert late.shira_M.tolist() == largest(base.weight, 9 + 6)
    randomise(late)
    late.load_state_dict({"weight": torch.randn(6, 9), "bias": base.bias, **late.state_dict()})
    assert late.shira_M.tolist() == largest(base.weight, 9 + 6), "a trained delta keeps its own"


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 18), lambda: Conv1D(18, 24)])
def test_loha_is_one_whether_its_weight_is_made_or_not(
    make: Callable[[], nn.Module], rank: int
) -> None:
    """Its fast path makes none where the rank is small; both agree with ``x W'^T + b``."""
    net = adapted(make().to(DOUBLE), "loha", rank=rank, alpha=5)
    randomise(net)
    x = torch.randn(2, 3, 24, dtype=DOUBLE, requires_grad=True)
    weight = net.weight.T if isinstance(net, nn.Linear) else net.weight
    leaves = [x, *net.parameters()]
    outputs = net(x), x @ weight + net.bias
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in outputs]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_vera_drops_inputs_of_the_delta_in_layers_that_read_their_weight() -> None:
    base = nn.LSTM(6, 4)
    net = adapted(base, "vera", rank=5, vera_dropout=0.5)
    randomise(net)
    delta = net.eval().weight_ih_l0 - base.weight_ih_l0
    ratio = (net.train().weight_ih_l0 - base.weight_ih_l0) / delta
    assert set(ratio[0].round().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-3, rtol=0)


def dense(w: Any, where: Any, values: Any) -> Any:
    """A matrix like `w` of zeros but for the values at those places."""
    matrix = np.zeros(w.size, w.dtype)
    matrix[where] = values
    return matrix.reshape(w.shape)


COMPLEX: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "loha": lambda w, p: w + (p["loha_B1"] @ p["loha_A1"]) * (p["loha_B2"] @ p["loha_A2"]),
    "lokr": lambda w, p: w + np.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
    "fourierft": lambda w, p: w + 150 * np.fft.ifft2(dense(w, p["fourierft_E"], p["fourierft_c"])),
    "shira": lambda w, p: w + dense(w, p["shira_M"], p["shira_S"]),
    "vera": lambda w, p: w + (p["vera_b"][:, None] * p["vera_B"] * p["vera_d"]) @ p["vera_A"],
}


@pytest.mark.parametrize(("method", "formula"), COMPLEX.items())
def test_complex_weights(method: str, formula: Callable[..., Any]) -> None:
    base = nn.Linear(6, 4, dtype=torch.complex128)
    net = adapted(base, method)
    x = torch.randn(3, 6, dtype=torch.complex128)
    assert torch.equal(net(x), base(x))
    randomise(net)
    added = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    numbers = {name: tensor.detach().numpy() for name, tensor in added.items()}
    expected = torch.from_numpy(formula(base.weight.detach().numpy(), numbers))
    torch.testing.assert_close(net.weight.detach(), expected, rtol=0, atol=1e-12)
    output = net(x)
    torch.testing.assert_close(output, x @ expected.T + base.bias, rtol=0, atol=1e-12)
    output.abs().sum().backward()
    assert all(p.grad.is_complex() and p.grad.abs().sum() > 0 for p in net.parameters())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "too many frequencies": (lambda: made(FourierFT(n_frequency=21), 5, 4), "21 is above 20"),
    "a rank that w2 cannot have": (lambda: made(LoKr(rank=3), 12, 4), "rank 3 is above 2"),
    "more terms than elements": (lambda: made(VeRA(rank=21), 5, 4), "rank 21 is above 20"),
    "a rank without low-rank factors": (lambda: LoKr(rank=2, full_matrix=True), "for rank to do"),
    "two settings without them": (
        lambda: LoKr(alpha=0, decompose_both=True, full_matrix=True),
        "for alpha, decompose_both to do",
    ),
    "a factor of zero": (lambda: LoKr(factor=0), "factor is 0, expected -1 or an integer"),
    "an unknown mask": (lambda: SHiRA(mask="largest"), "'random' or 'magnitude'"),
    "a negative seed": (lambda: VeRA(seed=-1), "seed is -1"),
    "a dropout of one": (lambda: VeRA(vera_dropout=1), r"number in \[0, 1\)"),
    "an infinite scaling": (lambda: FourierFT(scaling=float("inf")), "finite number"),
    "an infinite alpha": (lambda: LoHa(alpha=float("nan")), "finite number"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_full_matrices_have_no_size_to_choose() -> None:
    strategy = FineTuningStrategy([(mc_layer(), ma_adapt("lokr", full_matrix=True))])
    with pytest.raises(ValueError, match="size to choose"):
        suggest(nn.Linear(8, 8), budget=0.5, strategy=strategy)


def test_too_large_a_size_is_clipped_where_that_is_asked_for() -> None:
    clipped = made(FourierFT(n_frequency=99, clip_n_frequency=True), 5, 4)["fourierft_E"]
    assert sorted(clipped.tolist()) == list(range(20))
    assert made(LoKr(rank=9, clip_rank=True), 12, 4)["lokr_w2_a"].shape == (4, 2)
    assert made(VeRA(rank=99, clip_rank=True), 5, 4)["vera_d"].shape == (20,)
    assert made(SHiRA(rank=4), 5, 4)["shira_S"].shape == (20,), "4 * (5 + 4) are too many"
