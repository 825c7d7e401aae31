"""What layers remember between calls without gradients, as for each token that is generated.

The reference is the formula of the paper by torch's own operations on the tensors of the layer as
they are now, or a deep copy of the layer, which remembers nothing.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.pytorch_utils import Conv1D

import gift
from gift.kernels.operands import WATCHING
from gift.methods.dora import DoRA
from tests.common import weighted

INPUTS, OUTPUTS = 6, 5
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(INPUTS, OUTPUTS),
    "without bias": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
    "Conv1D of transformers": lambda: Conv1D(OUTPUTS, INPUTS),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(base: nn.Module, method: str = "dora") -> Any:
    """The layer in a network in evaluation mode, with a delta as after some training."""
    net = nn.Sequential(base)
    action = gift.factories.ma_adapt(method, rank=2, lora_alpha=5)
    gift.enable_fine_tuning(net, gift.FineTuningStrategy([(gift.factories.mc_name("0"), action)]))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return net.eval()


def adapted(base: nn.Module, method: str = "dora") -> Any:
    """The layer itself."""
    return network(base, method)[0]


def formula(layer: Any, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """``m V / |V| x + b`` with ``V = W + s B A``, and without a magnitude for LoRA."""
    frozen = layer._parameters["weight"] if weight is None else weight
    frozen = frozen.T if isinstance(layer, Conv1D) else frozen
    changed = frozen + 5 / 2 * layer.lora_B @ layer.lora_A
    if hasattr(layer, "dora_delta_m"):
        magnitude = frozen.norm(dim=1, keepdim=True) + layer.dora_delta_m
        changed = changed * magnitude / changed.detach().norm(dim=1, keepdim=True)
    return F.linear(x, changed, layer.bias)


def token() -> Tensor:
    return torch.randn(1, 1, INPUTS)


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that a DoRA computes its norms."""
    computed: list[None] = []
    own = DoRA.ratio

    def counted(self: Any, *args: Any) -> Tensor:
        computed.append(None)
        return own(self, *args)

    monkeypatch.setattr(DoRA, "ratio", counted)
    return computed


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
@layers
def test_without_gradients(make: Callable[[], nn.Module], method: str, rows: Any) -> None:
    layer = adapted(make(), method)
    for x in torch.randn(3, *rows, INPUTS):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), formula(layer, x))


def test_convolution(ratios: list[None]) -> None:
    layer = adapted(nn.Conv2d(4, 6, 3, padding=1))
    with torch.no_grad():
        for x in torch.randn(3, 2, 4, 5, 5):
            changed = layer._parameters["weight"].flatten(1) + 5 / 2 * layer.lora_B @ layer.lora_A
            norms = layer._parameters["weight"].flatten(1).norm(dim=1, keepdim=True)
            changed *= (norms + layer.dora_delta_m) / changed.norm(dim=1, keepdim=True)
            expected = F.conv2d(x, changed.view(6, 4, 3, 3), layer.bias, padding=1)
            torch.testing.assert_close(layer(x), expected)
    assert len(ratios) == 1


@layers
def test_norms_are_computed_once(make: Callable[[], nn.Module], ratios: list[None]) -> None:
    layer = adapted(make())
    with torch.no_grad():
        for _ in range(5):
            layer(token())
    with torch.inference_mode():
        layer(token())
    assert len(ratios) == 1


def _step(layer: Any) -> None:
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1)
    layer(token()).sum().backward()
    optimizer.step()


def _in_place(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        with torch.no_grad():
            layer.get_parameter(name).mul_(1.5)

    return change


def _unseen(name: str) -> Callable[[Any], None]:
    """As averages of weights are put in, which autograd does not count."""

    def change(layer: Any) -> None:
        parameter = layer.get_parameter(name)
        parameter.data.copy_(2 * parameter.detach())

    return change


def _another(layer: Any) -> None:
    layer.lora_A = nn.Parameter(3 * layer.lora_A.detach())


def _other_memory(layer: Any) -> None:
    layer.lora_B.data = 3 * layer.lora_B.detach()


def _other_strides(layer: Any) -> None:
    layer.lora_B.data = 3 * layer.lora_B.detach().T.contiguous().T


def _one_bit(layer: Any) -> None:
    last = layer.lora_A.data.view(torch.uint8)[-1, -1:]
    last ^= 64  # of the exponent


def _other_state(layer: Any) -> None:
    state = layer.state_dict()
    layer.load_state_dict(state | {"lora_A": 2 * state["lora_A"]})


def _in_training(layer: Any) -> None:
    layer.train()
    layer(token()).sum().backward()
    layer.eval()
    _unseen("lora_A")(layer)


CHANGES: dict[str, Callable[[Any], None]] = {
    "a step": _step,
    "B in place": _in_place("lora_B"),
    "A in place": _in_place("lora_A"),
    "magnitude in place": _in_place("dora_delta_m"),
    "bias in place": _in_place("bias"),
    "B unseen": _unseen("lora_B"),
    "A unseen": _unseen("lora_A"),
    "magnitude unseen": _unseen("dora_delta_m"),
    "bias unseen": _unseen("bias"),
    "another parameter": _another,
    "other memory": _other_memory,
    "other strides": _other_strides,
    "one bit": _one_bit,
    "another state": _other_state,
    "in training": _in_training,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), formula(layer, x))
        assert not torch.allclose(layer(x), before)


def test_conjugates_of_the_same_memory_are_noticed() -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS, dtype=torch.complex128)), token().cdouble()
    layer.lora_B = nn.Parameter(torch.randn(OUTPUTS, 2, dtype=torch.complex128))
    with torch.no_grad():
        before = layer(x)
        layer.lora_B = nn.Parameter(layer.lora_B.detach().conj())
        found = layer(x)
        layer.lora_B = nn.Parameter(layer.lora_B.detach().resolve_conj())
        torch.testing.assert_close(found, copy.deepcopy(layer)(x))
    assert not torch.allclose(found, before)


def test_strided_factors_are_remembered(ratios: list[None]) -> None:
    layer = adapted(nn.Linear(INPUTS, OUTPUTS))
    layer.lora_A.data = layer.lora_A.detach().T.contiguous().T
    with torch.no_grad():
        for _ in range(3):
            layer(token())
    assert len(ratios) == 1


def test_a_write_to_the_frozen_weight_is_noticed() -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    with torch.no_grad():
        layer(x)
        layer._parameters["weight"][0] += 1
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype(dtype: torch.dtype) -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    with torch.no_grad():
        layer(x)
        layer.to(dtype)
        x = x.to(dtype)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)
        expected = formula(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_factors_of_another_dtype_than_the_weight(method: str) -> None:
    """Factors in 32 bits beside a weight in 16 bits, for one row and for several."""
    layer = adapted(nn.Linear(INPUTS, OUTPUTS).bfloat16(), method)
    assert layer.lora_A.dtype == torch.float32
    precise = copy.deepcopy(layer).double()
    for shape in ((1, INPUTS), (3, INPUTS)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        with torch.no_grad():
            y, expected = layer(x), formula(precise, x.double())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)


def test_other_methods_settings_are_noticed() -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    delta = layer._gift_weights["weight"]
    with torch.no_grad():
        layer(x)
        delta.method = DoRA(rank=2, lora_alpha=1)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)


def test_gradients_flow_where_they_are_wanted() -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token().requires_grad_()
    wanted = [x, layer.lora_A, layer.lora_B, layer.dora_delta_m]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            layer(x)
        found = torch.autograd.grad(weighted(layer(x)), wanted)
        expected = torch.autograd.grad(weighted(formula(layer, x)), wanted)
        torch.testing.assert_close(found, expected)


def test_copies_and_files_have_nothing_of_it(ratios: list[None]) -> None:
    layer, x = adapted(nn.Linear(64, 64)), torch.randn(1, 1, 64)
    before = len(pickle.dumps(layer))
    with torch.no_grad():
        layer(x)
        assert len(pickle.dumps(layer)) < before + layer.lora_A.nbytes
        twin = copy.deepcopy(layer)
        _unseen("lora_A")(twin)
        torch.testing.assert_close(twin(x), formula(twin, x))
        torch.testing.assert_close(layer(x), formula(layer, x))
    assert len(ratios) == 2


def test_tensors_for_one_call() -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    factors = {"lora_A": 2 * layer.lora_A.detach()}
    weight = torch.randn(OUTPUTS, INPUTS)
    with torch.no_grad():
        own = layer(x)
        other = copy.deepcopy(layer)
        other.lora_A.copy_(factors["lora_A"])
        for _ in range(2):
            found = functional_call(layer, factors, x)
            torch.testing.assert_close(found, formula(other, x))
            found = functional_call(layer, {"weight": weight}, x)
            torch.testing.assert_close(found, formula(layer, x, weight))
            assert torch.equal(layer(x), own)


def test_transforms() -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), torch.randn(4, 1, INPUTS)
    with torch.no_grad():
        layer(x[0])
        torch.testing.assert_close(vmap(layer)(x), formula(layer, x))
        rows = torch.stack([layer.lora_A.detach(), 2 * layer.lora_A.detach()])
        found = vmap(lambda a: functional_call(layer, {"lora_A": a}, x[0]))(rows)
        assert torch.equal(found[0], layer(x[0])) or torch.allclose(found[0], layer(x[0]))
        assert not torch.allclose(found[0], found[1])


def test_autocast_has_a_ratio_of_its_own(ratios: list[None]) -> None:
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS).float()), token().float()
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))
        assert torch.equal(layer(x), plain)
    assert len(ratios) == 3


def test_disabled_and_merged() -> None:
    net, x = network(nn.Linear(INPUTS, OUTPUTS)), token()
    layer = net[0]
    with torch.no_grad():
        own = layer(x)
        with gift.disabled(net):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        with gift.merged(net):
            torch.testing.assert_close(layer(x), own)
        assert torch.equal(layer(x), own)


def test_compiled(dynamo: None, ratios: list[None]) -> None:
    """In one graph, which reads the factors as they are at each call."""
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), formula(layer, x))
            torch.testing.assert_close(layer(x), formula(layer, x))
            _unseen("lora_B")(layer)


def test_threads() -> None:
    """Each with values of its own for the same layer."""
    layer, x = adapted(nn.Linear(INPUTS, OUTPUTS)), token()
    twins = [copy.deepcopy(layer) for _ in range(3)]
    wrong: list[int] = []
    for number, twin in enumerate(twins):
        with torch.no_grad():
            twin.lora_A.mul_(number + 2)
    expected = [formula(twin, x).detach() for twin in twins]
    shared = [{**dict(layer.named_parameters()), "lora_A": twin.lora_A} for twin in twins]

    def run(number: int) -> None:
        method, bias = layer._gift_weights["weight"].method, layer.bias
        parameters = {**layer._gift_weights["weight"].tensors(layer), **shared[number]}
        product = gift.kernels.linear.product_of(layer, transposed=False)
        path = gift.methods.dora._linear
        with torch.no_grad():
            for _ in range(50):
                y = path(method, parameters, x, product, bias, False)
                if not torch.allclose(y, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_watchers_see_every_call() -> None:
    layer, seen = adapted(nn.Linear(INPUTS, OUTPUTS), "lora"), list[Any]()
    WATCHING.append(lambda *told: seen.append(told))
    try:
        with torch.no_grad():
            layer(token())
    finally:
        WATCHING.pop()
    assert seen == [(layer, "side")]
