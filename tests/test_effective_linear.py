"""Linear layers with an effective weight of which nothing is kept, against torch's own product.

The reference multiplies by ``layer.weight``, the effective weight that any code reads, and is
differentiated by plain autograd.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.kernels import recomputed
from gift.methods import METHODS, Method
from gift.private.torch.autograd import saved_by
from tests.common import weighted

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

INPUTS, OUTPUTS = 8, 6
EFFECTIVE = ("fourierft", "shira", "svdiff", "loha", "vera")
methods = pytest.mark.parametrize("method", EFFECTIVE)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are not worth it otherwise."""
    monkeypatch.setattr(recomputed, "FEW", 0)


def adapted(base: nn.Module, method: str, **settings: Any) -> Any:
    net = copy.deepcopy(base)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method, **settings))]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return net


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Linear(INPUTS, OUTPUTS, dtype=dtype)


def conv1d(dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = Conv1D(OUTPUTS, INPUTS).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def formula(layer: Any, x: Tensor) -> Tensor:
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return F.linear(x, weight, layer.bias)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    # Many rows, for which the effective weight is cheaper than factors.
    return torch.randn(3, 200, INPUTS, dtype=dtype, requires_grad=True)


def is_used(y: Tensor) -> bool:
    node: Any = y.grad_fn
    while node is not None and "EffectiveLinear" not in node.name():
        node = node.next_functions[0][0]
    return node is not None


@methods
@pytest.mark.parametrize("make", [linear, conv1d])
def test_values_and_derivatives_of_both_orders(method: str, make: Callable[[], nn.Module]) -> None:
    net, x = adapted(make(), method), inputs()
    wanted = [x, *net.parameters()]
    results = []
    for call in (net, lambda x: formula(net, x)):
        y = call(x)
        first = torch.autograd.grad(weighted(y), wanted, create_graph=True)
        penalty = sum((g.square().sum() for g in first), x.new_zeros(()))
        second = torch.autograd.grad(penalty, wanted)
        results.append([y, *first, *second])
        assert is_used(y) is (call is net)
    for one, other in zip(*results, strict=True):
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * (1 + largest))


@methods
def test_no_values_of_the_weight_are_kept(method: str) -> None:
    net, x = adapted(linear(), method), inputs()
    y = net(x)
    sizes = {tensor.untyped_storage().nbytes() for tensor in saved_by(y.grad_fn)}
    assert INPUTS * OUTPUTS * 8 not in sizes - {
        tensor.untyped_storage().nbytes() for tensor in [*net.parameters(), *net.buffers()]
    }


def test_the_weight_is_made_once_in_a_backward_pass_for_all_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(INPUTS, INPUTS, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(x).tanh()
            return x

    net = Shared()
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt("svdiff"))]))
    made: list[int] = []
    cls: Any = METHODS["svdiff"]
    plain = cls.effective_weight

    def counted(self: Method, *args: Any) -> Any:
        made.append(1)
        return plain(self, *args)

    monkeypatch.setattr(cls, "effective_weight", counted)
    y = net(inputs())
    assert len(made) == 1
    weighted(y).backward()
    assert len(made) == 2


def test_a_gradient_of_the_input_alone() -> None:
    net, x = adapted(linear(), "svdiff"), inputs()
    y = net(x)
    found = torch.autograd.grad(weighted(y), x, retain_graph=True)
    expected = torch.autograd.grad(weighted(formula(net, x)), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(weighted(y), list(net.parameters()))
    wanted = torch.autograd.grad(weighted(formula(net, x)), list(net.parameters()))
    torch.testing.assert_close(again, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", ["delta", "base"])
@pytest.mark.parametrize("after_one", [False, True])
def test_writing_to_what_the_weight_is_made_of_is_an_error(which: str, after_one: bool) -> None:
    net, x = adapted(linear(), "svdiff"), inputs()
    y = net(x)
    if after_one:
        torch.autograd.grad(weighted(y), x, retain_graph=True)
    with torch.no_grad():
        (next(net.parameters()) if which == "delta" else net._parameters["weight"]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(y).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_sixteen_bits(dtype: torch.dtype) -> None:
    net, x = adapted(linear(dtype), "fourierft"), inputs(dtype)
    wanted = [x, *net.parameters()]
    results = []
    for call in (net, lambda x: formula(net, x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = call(x)
        results.append([y, *torch.autograd.grad(weighted(y.float()), wanted)])
        assert is_used(y) is (call is net)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * largest)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    net, x = adapted(linear(), "shira"), inputs()
    wanted = [x, *net.parameters()]
    found = []
    for call in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        for tensor in wanted:
            tensor.grad = None
        weighted(call(x)).backward()  # type: ignore[arg-type]
        found.append([tensor.grad for tensor in wanted])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_without_gradients_and_under_transforms_the_weight_is_read() -> None:
    net, x = adapted(linear(), "svdiff"), inputs()
    with torch.no_grad():
        torch.testing.assert_close(net(x), formula(net, x))
    torch.testing.assert_close(torch.func.vmap(net)(x), formula(net, x))
    found = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, formula(net, x))


class Reader(nn.Module):
    """Code that multiplies by weights itself, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64)
        self.before: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        self.before()
        return F.linear(x.tanh(), weight, self.layer.bias)


READERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "own": (Reader, (torch.randn(3, 200, INPUTS),)),
    "attention to itself": (
        lambda: nn.MultiheadAttention(INPUTS, 2, batch_first=True, dtype=torch.float64),
        (torch.randn(3, 9, INPUTS),) * 3,
    ),
    "attention to another": (
        lambda: nn.MultiheadAttention(INPUTS, 2, add_bias_kv=True, dtype=torch.float64),
        (torch.randn(5, 3, INPUTS), *(torch.randn(7, 3, INPUTS),) * 2),
    ),
}


@pytest.mark.parametrize("method", ["lora", "pissa", "loha", "svdiff"])
@pytest.mark.parametrize(("make", "given"), READERS.values(), ids=READERS)
def test_code_that_multiplies_by_weights_itself(
    method: str, make: Callable[[], nn.Module], given: tuple[Tensor, ...]
) -> None:
    net = adapted(make(), method)
    unlike = {id(x): x.double().requires_grad_() for x in given}
    inputs = [unlike[id(x)] for x in given]
    own = dict(net.named_parameters())
    wanted = [*unlike.values(), *(p for p in own.values() if p.requires_grad)]
    plain = copy.deepcopy(net)
    results = []
    for call in (net, lambda *x: functional_effective(plain, net, x)):
        y: Any = call(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        first = torch.autograd.grad(weighted(y), wanted, create_graph=True)
        penalty = sum((g.square().sum() for g in first), y.new_zeros(()))
        results.append([y, *first, *torch.autograd.grad(penalty, wanted)])
    for one, other in zip(*results, strict=True):
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * (1 + largest))


def functional_effective(plain: nn.Module, net: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The plain network with the effective weights of `net`, which are computed outside of calls.

    A sum with zero makes each of them a plain tensor.
    """
    disable_fine_tuning(plain)
    weights = {
        name: net.get_submodule(name.rpartition(".")[0]).__getattribute__(name.rpartition(".")[2])
        if "weight" in name
        else dict(net.named_parameters())[name]
        for name, _ in plain.named_parameters()
    }
    return functional_call(plain, {name: value + 0 for name, value in weights.items()}, inputs)


def test_what_is_computed_outside_of_a_call_is_left_to_torch() -> None:
    net, x = adapted(linear(), "lora"), inputs()
    outside, inside = F.linear(x, net.weight, net.bias), net(x)  # nodes that live have names
    assert "LowRank" in inside.grad_fn.name()
    assert "LowRank" not in outside.grad_fn.name()  # type: ignore[union-attr]


def test_a_weight_that_was_read_is_multiplied_as_it_was() -> None:
    """Although its delta was written meanwhile."""
    net, x = adapted(Reader(), "lora"), inputs()
    expected = net(x).detach()

    def write() -> None:
        with torch.no_grad():
            net.layer.lora_B += 1

    net.before = write
    torch.testing.assert_close(net(x).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_writing_to_a_factor_before_the_backward_pass_is_an_error(factor: str) -> None:
    """Of a weight whose layer reads it itself, so that autograd saves no factor."""
    net = adapted(nn.Bilinear(3, 4, 5, dtype=torch.float64), "lora", rank=1)
    y = net(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    with torch.no_grad():
        getattr(net, factor).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(y).backward()
