"""Forward-mode differentiation, infinities and what is not a number, in every method."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, ma_bottleneck, mc_any, mc_layer
from gift.methods import METHODS, method_of
from gift.methods.dora import DoRA
from tests.cases.methods import METHODS as CASES

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 6), (4,)),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def adapt(net: nn.Module, method: str, **settings: Any) -> nn.Module:
    enable_fine_tuning(net, FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))]))
    return net


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


def inputs(layer: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = LAYERS[layer][1]
    return torch.randint(0, 7, shape) if layer == "embedding" else torch.randn(shape, dtype=dtype)


@layers
@pytest.mark.parametrize("settings", [{}, {"detach_norm": False}])
@pytest.mark.parametrize("method", METHODS)
def test_forward_mode_gives_the_derivative_along_a_direction(
    method: str, layer: str, settings: dict[str, Any]
) -> None:
    """The gradient by backward passes times the direction; what is a constant there is one here."""
    if settings and method != "dora":
        return
    net = moved(adapt(LAYERS[layer][0]().double(), method, **settings))
    x = inputs(layer, torch.float64)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, given, (x,)).square().sum()

    gradients = torch.autograd.grad(loss(dict(parameters)), list(parameters.values()))
    pairs = zip(gradients, direction.values(), strict=True)
    expected = sum((g * d).sum() for g, d in pairs)
    _, by_jvp = torch.func.jvp(loss, (dict(parameters),), (direction,))
    torch.testing.assert_close(by_jvp, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = {
            name: torch.autograd.forward_ad.make_dual(p.detach(), direction[name])
            for name, p in parameters.items()
        }
        by_hand = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(by_hand, expected)


@layers
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e25, 1e-25, 0.0])
def test_dora_leaves_a_base_of_any_norm_as_it_is(layer: str, value: float) -> None:
    """Rows whose norm is not a finite number are trained as LoRA does."""
    net: Any = LAYERS[layer][0]()
    x = inputs(layer).abs()
    with torch.no_grad():
        net.weight.select(1, 0).fill_(0)
        if layer == "embedding":
            net.weight[:, 0] = value
        else:
            net.weight[0] = value
    before = net(x)
    adapt(net, "dora")
    for mode in (True, False):
        torch.testing.assert_close(
            net.train(mode)(x), before, rtol=0 if math.isinf(value) else 1e-6, atol=0,
            equal_nan=True,
        )  # fmt: skip
        assert torch.equal(net(x).isinf(), before.isinf())
    net(x).nan_to_num(0, 0, 0).sum().backward()


def test_dora_rows_of_infinite_norm_move_as_those_of_lora() -> None:
    method = DoRA(rank=2)
    frozen = torch.randn(4, 6)
    frozen[0], frozen[1, 2] = 0, math.inf
    parameters = {k: v.clone().requires_grad_() for k, v in method.init_parameters(frozen).items()}
    with torch.no_grad():
        for name in ("lora_A", "lora_B", "dora_delta_m"):
            parameters[name].normal_()
    got = method.effective_weight(frozen, parameters)
    update = parameters["lora_B"] @ parameters["lora_A"]
    torch.testing.assert_close(got[:2], (frozen + update)[:2])
    v = (frozen + update)[2:]
    magnitude = frozen[2:].norm(dim=1, keepdim=True) + parameters["dora_delta_m"][2:]
    torch.testing.assert_close(got[2:], magnitude * v / v.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("method", METHODS)
def test_an_output_that_is_barred_by_an_infinite_bias_stays_so(method: str, layer: str) -> None:
    """As classes are that must not be chosen; the others are trained, by finite gradients."""
    net: Any = LAYERS[layer][0]()
    x = inputs(layer)
    with torch.no_grad():
        net.bias[1] = -math.inf
    before = net(x)
    adapt(net, method)
    assert torch.equal(net(x), before)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    after = net(x)
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.equal(after[:, 0], before[:, 0])
    if method not in ("ia3", "ssf"):  # which train a factor of the infinite bias itself
        after.softmax(1).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("parallel", [False, True])
def test_a_bottleneck_that_is_no_number_shows(parallel: bool) -> None:
    """Infinite activations pass it by, row by row."""
    base, x = nn.Linear(6, 6), torch.randn(3, 6)
    enable_fine_tuning(base, FineTuningStrategy([(mc_any(), ma_bottleneck(parallel=parallel))]))
    for parameter in base.parameters():
        moved(base)
        assert base(x).isfinite().all()
        with torch.no_grad():
            parameter.fill_(math.nan)
        assert base(x).isnan().any()


def given_weight(net: Any, weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.functional_call(net, {"weight": weight}, (x,))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_another_base_for_one_call(name: str, copied: bool) -> None:
    """What a method knows of the frozen weight is that of the one which is given."""
    case = CASES[name]
    net = moved(adapt(nn.Linear(6, 5, bias=False).double(), case.method, **case.settings))
    net = pickle.loads(pickle.dumps(net)) if copied else net
    other, x = torch.randn(5, 6, dtype=torch.float64), inputs("linear", torch.float64)
    known = {n: t.detach() for n, t in [*net.named_parameters(), *net.named_buffers()]}
    if case.method == "svdiff":
        u, _, vh = torch.linalg.svd(other, full_matrices=False)
        known |= {"svdiff_U": u, "svdiff_Vh": vh}
    if case.method in ("lora_xs", "psoft", "tinylora"):  # signs are told apart
        known |= METHODS[case.method](**case.settings).fit(other.shape).derived(other)
    found, expected = given_weight(net, other)(x), x @ case.formula(other, known).T
    torch.testing.assert_close(found, expected)
    assert torch.equal(given_weight(net, nn.Parameter(other, requires_grad=False))(x), found)
    before = net(x)
    assert torch.equal(given_weight(net, known["weight"].clone())(x), before)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("name", ["dora", "dora_full_gradient"])
def test_the_gradient_of_a_base_that_is_given_to_dora(name: str) -> None:
    """Its magnitude is the norm of that base, which depends on it: also where it is the own one."""
    case = CASES[name]
    net = moved(adapt(nn.Linear(6, 5, bias=False).double(), "dora", **case.settings))
    x, known = inputs("linear", torch.float64), dict(net.named_parameters())

    def expected(weight: Tensor) -> Tensor:
        return (x @ case.formula(weight, known).T).square().sum()

    def found(weight: Tensor) -> Tensor:
        return given_weight(net, weight)(x).square().sum()

    own = net.get_parameter("weight").detach()
    for weight in (own, torch.randn_like(own)):
        by_formula = torch.func.grad(expected)(weight)
        torch.testing.assert_close(torch.func.grad(found)(weight), by_formula)
        asked = weight.requires_grad_()
        (by_backward,) = torch.autograd.grad(found(asked), asked)
        torch.testing.assert_close(by_backward, by_formula)


def assigned(net: nn.Module) -> nn.Module:
    state = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.load_state_dict(state, assign=True)
    return net


def merged(net: nn.Module) -> nn.Module:
    with gift.merged(net):
        net(inputs("linear"))
    with gift.disabled(net):
        net(inputs("linear"))
    return net


@pytest.mark.parametrize("method", ["dora", "svdiff"])
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net,
        lambda net: net.double().float(),
        lambda net: net.share_memory(),
        lambda net: net.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        gift.reference,
        assigned,
        merged,
    ],
)
def test_what_is_derived_from_the_base_is_derived_once(
    method: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is derived anew while a network computes with its own base."""
    net = change(moved(adapt(nn.Linear(6, 5), method)))

    def derived(*_: Any) -> Any:
        raise AssertionError("the base is its own")

    monkeypatch.setattr(METHODS[method], "derived", derived)
    for mode in (True, False):
        net.train(mode)(inputs("linear"))


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_network_with_its_base_frozen(method: str) -> None:
    """Bit for bit, also where torch multiplies in another order by a weight that is trained.

    It does so without a bias, and with an input that is not contiguous, as in the mixer of Mamba.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 10, bias=False), nn.Linear(10, 5))
    x = torch.randn(2, 64, 8).transpose(1, 2)
    with torch.no_grad():
        trained = net(x)
        net.requires_grad_(False)
        frozen = net(x)
        net.requires_grad_(True)
        adapt(net, method)
        assert torch.equal(net(x), frozen)
        gift.disable_fine_tuning(net)
        assert torch.equal(net(x), trained)


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_dora_changes_a_row_of_zeros_as_lora_does(detach_norm: bool, started: bool) -> None:
    """It has no direction, so no magnitude: every gradient is finite, and that row is ``B A``."""
    method = method_of("dora", {"rank": 2, "detach_norm": detach_norm}).fit((4, 6))
    matrix = torch.randn(4, 6, dtype=torch.float64)
    matrix[1] = 0
    own = {name: value.detach() for name, value in method.init_parameters(matrix).items()}
    if started:
        own["lora_B"] = torch.randn(4, 2, dtype=torch.float64)
    trained = {name: own[name].requires_grad_() for name in ("lora_B", "lora_A", "dora_delta_m")}
    effective, weights = method.effective_weight(matrix, own), torch.randn_like(matrix)
    gradients = torch.autograd.grad((effective * weights).sum(), list(trained.values()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    b, a = own["lora_B"].detach(), own["lora_A"].detach()
    torch.testing.assert_close(effective[1], (b @ a)[1])
    torch.testing.assert_close(gradients[0][1], weights[1] @ a.T)
    assert gradients[2][1] == 0
