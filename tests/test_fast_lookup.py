"""The fast path of embeddings with a low-rank delta, against the formula written out.

The reference looks rows up in ``W + s B A``, differentiated by plain autograd.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.kernels.low_rank_lookup import LowRankLookup
from tests.common import weighted

ENTRIES, FEATURES = 40, 6
IDS = {
    "sentences": torch.tensor([[3, 0, 7, 3], [39, 1, 0, 0]]),
    "one": torch.tensor(5),
    "none": torch.zeros(0, 3, dtype=torch.int64),
    "int32": torch.tensor([1, 1, 2], dtype=torch.int32),
    "more than entries": torch.arange(90) % ENTRIES,
}
OWN = nn.Embedding.__constants__  # the settings of the layer itself
ids = pytest.mark.parametrize("index", IDS.values(), ids=IDS)


def adapted(method: str = "lora", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """An embedding with a delta as after some training."""
    how = {
        name: settings.pop(name) for name in list(settings) if name in nn.Embedding.__constants__
    }
    net = nn.Embedding(ENTRIES, FEATURES, dtype=dtype, **how)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method, **settings))]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return net


def effective(net: Any) -> Tensor:
    scaling = net._gift_weights["weight"].method.scaling
    return net._parameters["weight"] + scaling * net.lora_B @ net.lora_A


def formula(net: Any, index: Tensor) -> Tensor:
    return F.embedding(index, effective(net), net.padding_idx)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "detach" not in func.__name__:
            self.found = max(self.found, result.numel())
        return result


@ids
@pytest.mark.parametrize("padding", [None, 0])
def test_rows_and_gradients_are_those_of_the_effective_weight(
    index: Tensor, padding: int | None
) -> None:
    net = adapted(rank=2, lora_alpha=3.0, padding_idx=padding)
    found, expected = (
        [y, *torch.autograd.grad(weighted(y), list(net.parameters()), retain_graph=True)]
        for y in (net(index), formula(net, index))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(net(index), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_fa"])
def test_no_tensor_has_the_size_of_the_table(method: str) -> None:
    net = adapted(method)
    with Largest() as largest:
        weighted(net(torch.tensor([1, 2, 2]))).backward()
    assert FEATURES * 3 <= largest.found < ENTRIES * FEATURES


def test_second_derivatives() -> None:
    net = adapted(rank=2)
    index = torch.tensor([1, 0, 2, 2])

    def call(left: Tensor, right: Tensor) -> Tensor:
        rows: Tensor = LowRankLookup.apply(index, net._parameters["weight"], left, right, 0.5, None)
        return rows

    inputs = (net.lora_B.detach().requires_grad_(), net.lora_A.detach().requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_one_factor_is_frozen() -> None:
    net = adapted()
    net.lora_A.requires_grad_(False)
    index = torch.tensor([4, 4, 9])
    found, expected = (
        torch.autograd.grad(weighted(call(index)), net.lora_B)
        for call in (net, lambda x: formula(net, x))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_round_once(autocast: bool) -> None:
    net = adapted(dtype=torch.bfloat16)
    index = torch.tensor([1, 7])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = net(index)
        weighted(found).backward()
    exact = (effective(net).double())[index]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double(), exact.bfloat16().double())
    assert net.lora_B.grad.dtype == torch.float32


def test_start_is_that_of_the_base() -> None:
    net = nn.Embedding(ENTRIES, FEATURES)
    index = torch.arange(7)
    base = net(index).detach()
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt("lora"))]))
    assert torch.equal(net(index), base)


def test_a_tied_head_sees_the_same_delta() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(ENTRIES, FEATURES, dtype=torch.float64)
            self.head = nn.Linear(FEATURES, ENTRIES, bias=False, dtype=torch.float64)
            self.head.weight = self.tokens.weight

        def forward(self, index: Tensor) -> Tensor:
            hidden: Tensor = self.head(self.tokens(index).tanh())
            return hidden

    net, index = Tied(), torch.tensor([[1, 2, 30]])
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt("lora"))]))
    parameters = list(net.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    y = net(index)
    weight = effective(net.tokens)
    expected = F.linear(F.embedding(index, weight).tanh(), weight)
    found, wanted = (
        torch.autograd.grad(weighted(one), parameters, retain_graph=True) for one in (y, expected)
    )
    torch.testing.assert_close([y, *found], [expected, *wanted], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("setting", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_other_rules_of_embeddings_are_kept(setting: dict[str, Any]) -> None:
    net, index = adapted(**setting), torch.tensor([3, 3, 5])
    weight = effective(net)
    expected = F.embedding(index, weight.clone(), **setting)
    y = net(index)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if "scale_grad_by_freq" in setting:
        found, wanted = (torch.autograd.grad(weighted(one), net.lora_B)[0] for one in (y, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_dropout_and_transforms_use_the_effective_weight() -> None:
    net = adapted(lora_dropout=0.5)
    index = torch.tensor([[1, 2], [3, 4]])
    torch.testing.assert_close(net.eval()(index), formula(net, index))
    torch.testing.assert_close(vmap(net)(index), formula(net, index))
    other = {name: torch.randn_like(p) for name, p in net._parameters.items()}
    expected = F.embedding(index, other["weight"] + other["lora_B"] @ other["lora_A"])
    torch.testing.assert_close(functional_call(net, other, (index,)), expected)
    net.train()
    torch.manual_seed(0)
    assert not torch.allclose(net(index), formula(net, index))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    net = adapted(padding_idx=0)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 5):
        index = torch.arange(length)
        found, expected = (
            torch.autograd.grad(weighted(call(index)), list(net.parameters()))
            for call in (compiled, lambda x: formula(net, x))
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
