"""Products by oneDNN: right, and only where nobody follows who does not know them.

Processors differ in whether they are made at all, so both answers are set here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.kernels import onednn
from gift.kernels.cost_model import FORMS
from tests.common import delta, per_example_gradients, weighted

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
]

ONEDNN = "mkldnn::_linear_pointwise"


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a processor that prefers oneDNN, for products of any size; or as on another one."""
    if request.param and not onednn.has_onednn():
        pytest.skip("torch was built without oneDNN, as it is for some processors")
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(onednn, "MANY", 1)
    return bool(request.param)


def made_by_onednn(call: Callable[[], Any]) -> int:
    """How many products oneDNN made."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    return sum(event.count for event in run.key_averages() if event.key == ONEDNN)


def matrices(rows: int, inner: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Two of them, the second as it may lie in memory, or as a parameter."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    wide = torch.randn(inner, 2 * columns)
    seconds = [b, b.mT.contiguous().mT, nn.Parameter(b), wide[:, ::2], b[:1].expand(inner, -1)]
    return [(a, second) for second in seconds]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 2), (7, 64, 33), (130, 96, 257), (64, 1, 64)])
def test_products(preferred: bool, sizes: tuple[int, int, int]) -> None:
    """As in 64 bits, as far as 32 allow it, and by whom they should."""
    for a, b in matrices(*sizes):
        exact = a.double() @ b.double()
        with torch.no_grad():
            found = onednn.matmul(a, b)
            assert made_by_onednn(partial(onednn.matmul, a, b)) == preferred
        most = a.abs().double() @ b.abs().double() * (sizes[1] + 1) * 2**-24
        assert ((found - exact).abs() <= most).all()


@pytest.mark.parametrize("preferred", [True], indirect=True)
def test_who_else_is_left_to_torch(preferred: bool) -> None:
    """Graphs, transposed or empty matrices, other dtypes, counters, modes, a switch."""
    a, b = torch.randn(4, 6), torch.randn(6, 5)

    def product() -> None:
        torch.testing.assert_close(onednn.matmul(a, b), a @ b)

    def counted() -> None:
        with FlopCounterMode(display=False) as counter:
            product()
        assert counter.get_total_flops() == 2 * 2 * 4 * 6 * 5

    assert made_by_onednn(product) == 0  # with a graph
    with torch.no_grad():
        assert made_by_onednn(product) == 1
        assert made_by_onednn(counted) == 0
        with torch.backends.mkldnn.flags(enabled=False):
            assert made_by_onednn(product) == 0
        with torch.device("cpu"):
            assert made_by_onednn(product) == 0
        a = torch.randn(6, 4).mT
        assert made_by_onednn(product) == 0
        for dtype in (torch.float64, torch.bfloat16, torch.complex64):
            a, b = torch.randn(4, 6).to(dtype), torch.randn(6, 5).to(dtype)
            assert made_by_onednn(product) == 0
        for shape in ((0, 6, 5), (4, 0, 5), (4, 6, 0)):
            a, b = torch.randn(shape[:2]), torch.randn(shape[1:])
            assert made_by_onednn(product) == 0


def layer(method: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A linear layer with a delta that is not zero; the same values in each dtype."""
    torch.manual_seed(1)
    net = nn.Linear(24, 36).double()
    enable_fine_tuning(
        net, FineTuningStrategy([(mc_any(), ma_adapt(method, train_bias=True, **settings))])
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net.to(dtype)


def assert_near(found: Any, expected: Any) -> None:
    """In 32 bits, relative to the largest of each tensor."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


METHODS: list[tuple[str, dict[str, Any]]] = [
    *(("lora", {"form": form}) for form in FORMS),
    ("lora_fa", {}),
    ("lokr", {"rank": 2}),
]
methods = pytest.mark.parametrize(
    ("method", "settings"), METHODS, ids=["_".join([m, *map(str, s.values())]) for m, s in METHODS]
)


@methods
def test_gradients_of_layers(preferred: bool, method: str, settings: dict[str, Any]) -> None:
    """Those of the same layer in 64 bits, which torch computes alone."""
    inputs, results = torch.randn(2, 40, 24, dtype=torch.float64), []
    for dtype in (torch.float32, torch.float64):
        net, x = layer(method, dtype, **settings), inputs.to(dtype).requires_grad_()
        wanted = [x, *net.parameters()]
        results.append(torch.autograd.grad(weighted(net(x)), wanted))
        y = weighted(net(x))
        made = made_by_onednn(partial(torch.autograd.grad, y, wanted))
        assert made == (preferred and dtype == torch.float32)
    found, exact = results
    assert_near([g.double() for g in found], exact)


@pytest.mark.parametrize("preferred", [True], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_those_who_follow_a_backward_pass(dynamo: None, preferred: bool, form: str) -> None:
    """Graphs of gradients, batches of them, those of each example, and compiled ones."""
    net, x = layer("lora", form=form), torch.randn(12, 24, requires_grad=True)
    wanted = [x, *net.parameters()]

    def gradients(loss: Tensor, **how: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, wanted, retain_graph=True, **how)

    y = net(x)
    plain = gradients(weighted(y))
    assert_near(gradients(weighted(y), create_graph=True), plain)
    assert_near(
        gradients(weighted(torch.compile(net, backend="aot_eager", fullgraph=True)(x))), plain
    )

    twice = gradients(weighted(gradients(y.square().sum(), create_graph=True)[0]))
    frozen = net._parameters["weight"]
    exact = F.linear(x, frozen + delta(net, frozen, net.lora_B, net.lora_A), net.bias)
    expected = gradients(weighted(gradients(exact.square().sum(), create_graph=True)[0]))
    assert_near(twice, expected)

    directions = torch.randn(3, *y.shape)
    many = torch.autograd.grad(y, wanted, directions, is_grads_batched=True, retain_graph=True)
    for index, direction in enumerate(directions):
        assert_near([g[index] for g in many], gradients((y * direction).sum()))

    call, own = per_example_gradients(net)
    found = call(own, x.detach())
    for index in range(len(x)):
        assert_near(
            [g[index] for g in found.values()], gradients(weighted(net(x[index : index + 1])))[1:]
        )


@pytest.mark.parametrize("preferred", [True], indirect=True)
@methods
def test_outputs_stay_those_of_torch(
    preferred: bool, method: str, settings: dict[str, Any]
) -> None:
    """Right after enabling they are those of the plain layer, bit for bit."""
    net, x = nn.Linear(24, 36), torch.randn(50, 24)
    before = net(x)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method, **settings))]))
    assert torch.equal(net(x), before)


def test_which_processor_prefers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of AMD with AVX-512, as far as torch tells; and where there are two to choose from."""
    capabilities = {"avx512_f": True, "cpu_name": "AMD EPYC 9654"}
    for known, expected in (
        (capabilities, torch.backends.mkl.is_available() and onednn.has_onednn()),
        ({**capabilities, "avx512_f": False}, False),
        ({**capabilities, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert onednn.prefers_onednn.__wrapped__() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not onednn.prefers_onednn.__wrapped__()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not onednn.prefers_onednn.__wrapped__()
