"""Deltas on quantised bases: torchao's tensors, and the layers of bitsandbytes.

What a quantised weight stands for is told by the package's own function, or by the definition of
its format. The reference is the paper's formula on that matrix, in float64 and by autograd, and the
plain network that holds it.
"""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift import (
    FineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    plan_fine_tuning,
    suggest,
)
from gift.core.delta import added_names
from gift.core.state_settings import without_settings
from gift.core.weights.record import weight_deltas
from gift.errors import AdaptationError
from gift.factories import ma_adapt, ma_train, mc_layer, mc_name, mc_path, pa_train, pc_name
from gift.layers.table import dotted
from gift.methods import METHODS
from gift.quantization import dequantised, is_quantised, requantised, shape_of
from gift.strategies import STRATEGIES, BitFitFineTuningStrategy
from tests.cases.methods import METHODS as FORMULAS
from tests.cases.methods import MethodCase
from tests.cases.selection import cells

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


# The kinds of quantised layers. `EXACT` kernels multiply by the dequantised matrix in float32, or
# by its integers and then by the scale: what differs is the order of roundings. `ROUNDED` ones
# round the input to 8 bits as well: a step is 1/127 of the largest value, the error is uniform
# within it, so that its standard deviation is 1/440 of the largest value. That is four standard
# deviations of a normal input at most: 1 %, and factors of methods may double it. Or they compute
# in bfloat16, whose steps are 1/128, which is less.

EXACT, ROUNDED = 2e-5, 2e-2


@dataclass(frozen=True)
class Kind:
    """One kind of quantised layer.

    Args:
        quantise: from a plain linear layer, the quantised one.
        dequantise: from that, its matrix; without gift.
        rounding: how far its kernel is from a product with that matrix.
        backward: the same for the gradient of its input.
        trains: the mode in which it is compared.
    """

    quantise: Callable[[nn.Linear], nn.Module]
    dequantise: Callable[[Any], Tensor] = lambda layer: layer.weight.dequantize()
    rounding: float = EXACT
    backward: float = EXACT
    trains: bool = True

    def linear(self, columns: int, rows: int, seed: int = 0) -> Any:
        return self.quantise(plain_linear(columns, rows, seed)).train(self.trains)

    def network(self) -> Any:
        return nn.Sequential(self.linear(64, 128), nn.Tanh(), self.linear(128, 64, seed=1))


def plain_linear(columns: int, rows: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * columns**-0.5)
    return layer


def by_torchao(config: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
    def quantise(module: nn.Module) -> Any:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(module, config(torchao))
        return module

    return quantise


def int4_weight_only(torchao: Any) -> Any:
    """The stable formats of int4 need an accelerator; this is the one for the CPU."""
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    return int4.PrototypeInt4WeightOnlyConfig(group_size=32)


def int4_matrix(layer: Any, seed: int = 0) -> Tensor:
    """Its definition: 16 levels between the least and the largest value of 32 neighbours."""
    rows, columns = layer.weight.shape
    groups = plain_linear(columns, rows, seed).weight.detach().reshape(rows, -1, 32)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (most - least) / 15
    return (((groups - least) / step).round() * step + least).reshape(rows, columns)


def in_groups(torchao: Any) -> Any:
    return torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32))


def four_bits_in_eight(torchao: Any) -> Any:
    per_group = torchao.PerGroup(32)
    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=per_group)


def scaled_inputs(layer: Any) -> Any:
    """As AWQ and SmoothQuant do: the kernel multiplies its input by these."""
    scales = torch.linspace(0.5, 1.5, layer.in_features)
    layer.weight.act_pre_scale = scales.to(layer.weight.dtype)
    return layer


def nf4_of_torchao(layer: nn.Linear) -> nn.Linear:
    torchao = pytest.importorskip("torchao.quantization")
    blocks = {"block_size": 32, "scaler_block_size": 2}
    weight = torchao.to_nf4(layer.weight.detach(), **blocks)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def by_bitsandbytes(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        packed = getattr(pytest.importorskip("bitsandbytes").nn, name)
        other = packed(layer.in_features, layer.out_features, **options)
        other.load_state_dict(layer.state_dict())
        return other.to("cpu")

    return quantise


def matrix_of_4_bits(layer: Any) -> Tensor:
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def matrix_of_8_bits(layer: Any) -> Tensor:
    """Its definition: each row times its largest absolute value, over 127."""
    largest = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * largest[:, None] / 127


int8_layer = by_bitsandbytes("Linear8bitLt", has_fp16_weights=False)
KINDS = {
    "torchao int8": Kind(by_torchao(lambda ao: ao.Int8WeightOnlyConfig())),
    "torchao int8 groups": Kind(by_torchao(in_groups)),
    "torchao int8 scaled": Kind(
        lambda layer: scaled_inputs(KINDS["torchao int8"].quantise(layer)),
        lambda layer: layer.weight.dequantize() * layer.weight.act_pre_scale,
    ),
    "torchao int8 inputs": Kind(
        by_torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()), rounding=ROUNDED
    ),
    "torchao int4": Kind(by_torchao(int4_weight_only), int4_matrix),
    "torchao int4 in int8": Kind(by_torchao(four_bits_in_eight)),
    "torchao float8": Kind(by_torchao(lambda ao: ao.Float8WeightOnlyConfig())),
    "torchao nf4": Kind(nf4_of_torchao, lambda layer: layer.weight.get_original_weight()),
    "bitsandbytes nf4": Kind(by_bitsandbytes("LinearNF4"), matrix_of_4_bits),
    "bitsandbytes fp4": Kind(
        by_bitsandbytes("LinearFP4", compress_statistics=False), matrix_of_4_bits
    ),
    "bitsandbytes nf4 in bfloat16": Kind(
        by_bitsandbytes("LinearNF4", compute_dtype=torch.bfloat16),
        matrix_of_4_bits,
        rounding=ROUNDED,
        backward=ROUNDED,
    ),
    "bitsandbytes int8": Kind(int8_layer, matrix_of_8_bits),
    "bitsandbytes int8 inputs": Kind(int8_layer, matrix_of_8_bits, rounding=ROUNDED, trains=False),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
NOT_TO_COPY = {"torchao nf4": "its clone quantises again, with other blocks"}
SOME = {name: KINDS[name] for name in ("torchao int8", "bitsandbytes nf4", "bitsandbytes int8")}
of_some_kinds = pytest.mark.parametrize("kind", SOME.values(), ids=SOME)


def adapt(net: nn.Module, method: str, **settings: Any) -> Any:
    enable_fine_tuning(net, FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))]))
    return net


def train(net: nn.Module) -> None:
    """As after some steps: every parameter of the delta has moved."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def inputs(columns: int = 64) -> Tensor:
    return torch.randn(6, columns, generator=torch.Generator().manual_seed(3))


def packed(net: nn.Module) -> list[Tensor]:
    """Copies of all that quantised weights consist of."""
    return [part.clone() for _, p in net.named_parameters() if is_quantised(p) for part in parts(p)]


def parts(weight: Any) -> list[Tensor]:
    if hasattr(weight, "__tensor_flatten__"):
        inner = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        return [part for tensor in inner for part in parts(tensor)]
    state = getattr(weight, "quant_state", None)
    return [weight.data] if state is None else [weight.data, state.absmax]


def assert_same_bits(net: nn.Module, before: list[Tensor]) -> None:
    now = packed(net)
    assert len(now) == len(before) > 0
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def assert_near(found: Tensor, expected: Tensor, rounding: float, what: str = "") -> None:
    error = (found.double() - expected.double()).norm()
    assert error <= rounding * expected.double().norm(), f"{what}: {error / expected.norm()}"


# The mathematics.


@cells(kind=KINDS, case=FORMULAS)
def test_outputs_and_gradients_are_those_of_the_formula(kind: Kind, case: MethodCase) -> None:
    layer = kind.linear(32, 64)
    base, bias = kind.dequantise(layer).double(), layer.bias.detach().double()
    adapt(layer, case.method, **case.settings)
    train(layer)
    added = {
        key: getattr(layer, name) for key, name in weight_deltas(layer)["weight"].names.items()
    }
    copies = {
        key: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for key, t in added.items()
    }
    x = inputs(32).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    weight = case.formula(base, copies)
    if case.adapts_bias:
        bias = case.of_bias(bias[:, None], copies, base).squeeze(-1)
    expected, output = x64 @ weight.T + bias, layer(x)

    assert output.dtype == torch.float32
    assert_near(output, expected, kind.rounding, "output")
    assert_near(layer.weight, weight, EXACT, "weight as others read it")
    towards = torch.randn_like(expected)
    expected.backward(towards)
    output.backward(towards.float())
    assert_near(x.grad, x64.grad, kind.backward, "gradient of the input")
    trained = [key for key, tensor in added.items() if tensor.requires_grad]
    assert trained
    for key in trained:
        assert added[key].dtype == torch.float32
        # The gradient of a single number is a sum over all outputs, in which terms cancel.
        rounding = kind.rounding * (8 if copies[key].numel() == 1 else 1)
        assert_near(added[key].grad, copies[key].grad, rounding, f"gradient of {key}")


@cells(kind=KINDS, method=[*METHODS])
def test_the_plain_network_that_it_stands_for_takes_the_same_delta(kind: Kind, method: str) -> None:
    """A delta that was trained beside a quantised base is one for the dequantised base."""
    layer, plain = kind.linear(32, 64), plain_linear(32, 64)
    with torch.no_grad():
        plain.weight.copy_(kind.dequantise(layer))
    for net in (layer, plain):
        adapt(net, method)
    train(layer)
    plain.load_state_dict(layer.state_dict())
    assert_near(layer(inputs(32)), plain(inputs(32)), kind.rounding)


# The life of a network.


@cells(name=[*KINDS], method=[*METHODS])
def test_enabled_trained_saved_copied_and_disabled(name: str, method: str) -> None:
    kind = KINDS[name]
    net, x = kind.network(), inputs()
    output, before, weights = net(x), packed(net), [net[0].weight, net[2].weight]
    adapt(net, method)
    if dotted(nn.Linear.forward) in METHODS[method].forwards:  # computed beside the base
        assert torch.equal(net(x), output)
    else:
        assert_near(net(x), output, kind.rounding)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        (net(x) - 1).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        net.eval()(x)
    assert_same_bits(net, before)

    net.train(kind.trains)
    trained = net(x)
    state = net.state_dict()
    deltas = {f"{path}.{key}" for path in "02" for key in added_names(net.get_submodule(path))}
    assert set(without_settings(state)) <= deltas
    fresh = kind.network()
    fresh(x)
    adapt(fresh, method).load_state_dict(state)
    assert torch.equal(fresh(x), trained)
    if name not in NOT_TO_COPY:
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), trained)
        train(twin)
        assert torch.equal(net(x), trained)

    disable_fine_tuning(net)
    assert net[0].weight is weights[0]
    assert net[2].weight is weights[1]
    assert_same_bits(net, before)
    assert torch.equal(net(x), output)


@of_every_kind
def test_stored_as_a_whole(kind: Kind) -> None:
    net, x = kind.network(), inputs()
    for layer in net:
        vars(layer).pop("extra_repr", None)  # which quantize_ sets, and pickle cannot hold
    base = net(x)
    adapt(net, "dora")
    train(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), net(x))
    assert torch.equal(disable_fine_tuning(twin)(x), base)


@of_some_kinds
def test_compiled_in_one_graph(kind: Kind) -> None:
    if (
        torch.__version__.startswith("2.6")
        and "bitsandbytes" in type(kind.linear(64, 64)).__module__
    ):
        pytest.skip("the compiler of torch 2.6 takes parameters of bitsandbytes for no tensors")
    torch._dynamo.reset()
    net, x = adapt(kind.network(), "dora"), inputs()
    train(net)
    expected = net(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    output = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@of_every_kind
def test_the_backward_pass_keeps_nothing_of_the_size_of_a_weight(kind: Kind) -> None:
    layer, kept = adapt(kind.linear(256, 256), "lora"), []
    x = inputs(256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert max(tensor.numel() for tensor in kept) < 256 * 256 / 8


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "svdiff"])
@of_every_kind
def test_in_half_precision(kind: Kind, method: str) -> None:
    """Networks are mostly quantised from bfloat16, which has 8 bits; the delta has 24."""
    layer = kind.quantise(plain_linear(64, 128).to(torch.bfloat16)).train(kind.trains)
    x, plain = inputs(), plain_linear(64, 128)
    base = layer(x.bfloat16())
    with torch.no_grad():
        plain.weight.copy_(dequantised(layer.weight, layer))
        plain.bias.copy_(layer.bias)
    adapt(layer, method)
    adapt(plain, method)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert_near(layer(x.bfloat16()), base, 0 if method != "svdiff" else ROUNDED)
    train(layer)
    plain.load_state_dict(layer.state_dict())
    output = layer(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_near(output, plain(x), ROUNDED)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@of_every_kind
def test_in_autocast(kind: Kind) -> None:
    layer, x = adapt(kind.linear(64, 128), "lora"), inputs()
    train(layer)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert_near(found, expected, ROUNDED)


@of_every_kind
def test_biases_may_train_as_well(kind: Kind) -> None:
    layer = adapt(kind.linear(64, 128), "lora", train_bias=True)
    output = layer(inputs().unsqueeze(0))
    towards = torch.randn_like(output)
    output.backward(towards)
    assert_near(layer.bias.grad, towards.sum((0, 1)), EXACT)


@of_some_kinds
def test_only_some_layers_of_a_quantised_network(kind: Kind) -> None:
    """Of the others nothing is saved either, not even the scales that belong to their weights."""
    net, x = kind.network(), inputs()
    net(x)
    strategy = FineTuningStrategy([(mc_name("2"), ma_adapt("lora"))])
    enable_fine_tuning(net, strategy)
    assert set(net.state_dict()) == {"2.lora_B", "2.lora_A"}
    outer = nn.ModuleDict({"net": net})
    assert set(outer.state_dict()) == {"net.2.lora_B", "net.2.lora_A"}
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@of_some_kinds
def test_the_whole_state_is_that_of_the_base_and_the_deltas(kind: Kind) -> None:
    net = kind.network()
    net(inputs())
    base = net.state_dict()
    strategy = FineTuningStrategy([(mc_layer(), ma_adapt("lora"))])
    enable_fine_tuning(net, strategy, trainable_state_dict=False)
    state = net.state_dict()
    assert set(base) < set(state)
    assert_same_bits(net, packed(net))
    assert all(type(state[key]) is type(value) for key, value in base.items())


@pytest.mark.parametrize("name", ["torchao int8", "torchao nf4", "bitsandbytes int8"])
def test_a_base_that_is_loaded_later_is_the_base(name: str) -> None:
    """DoRA's norms are those of the weight that came last."""
    kind = KINDS[name]
    base, x = kind.network(), inputs()
    late = nn.Sequential(kind.linear(64, 128, seed=5), nn.Tanh(), kind.linear(128, 64, seed=6))
    base(x)
    adapt(late, "dora").load_state_dict(base.state_dict())
    assert torch.equal(late(x), base(x))
    adapt(base, "dora")
    for one, other in zip(late.buffers(), base.buffers(), strict=True):
        assert torch.equal(one, other)


# All or nothing.


def broken_half_way(net: nn.Sequential, action: Callable[..., Any]) -> None:
    """Enable by an action on the first layer, after which another one fails."""

    def fail(*place: Any) -> None:
        raise KeyError("on purpose")

    caps = [(mc_name("0"), action), (mc_name("2"), fail)]
    with pytest.raises(KeyError, match="on purpose"):
        enable_fine_tuning(net, FineTuningStrategy(caps))


def put_another(module: Any) -> None:
    module.weight = nn.Parameter(torch.zeros(128, 64))


def write_data(module: Any) -> None:
    module.weight.data = torch.zeros_like(module.weight.data)


def write_inside(module: Any) -> None:
    parts(module.weight)[0].zero_()


def copy_over(module: Any) -> None:
    module.weight.copy_(copy.deepcopy(module.weight))
    write_inside(module)


@pytest.mark.parametrize("write", [put_another, write_inside, copy_over])
@of_some_kinds
def test_whatever_an_action_wrote_is_undone(kind: Kind, write: Callable[[Any], None]) -> None:
    def act(parent: Any, name: str, path: str, class_name: str, module: Any) -> None:
        with torch.no_grad():
            write(module)

    net, x = kind.network(), inputs()
    output, before, weight = net(x), packed(net), net[0].weight
    broken_half_way(net, act)
    assert net[0].weight is weight
    assert_same_bits(net, before)
    assert torch.equal(net(x), output)

    enable_fine_tuning(net, FineTuningStrategy([(mc_name("0"), act)]))
    disable_fine_tuning(net)
    assert net[0].weight is weight
    assert_same_bits(net, before)
    assert torch.equal(net(x), output)


@cells(kind=SOME, method=[*METHODS])
def test_a_failure_half_way_and_a_plan_leave_nothing(kind: Kind, method: str) -> None:
    net, x = kind.network(), inputs()
    output, before = net(x), packed(net)
    looks = [(type(m), {k: id(v) for k, v in vars(m).items()}, list(m._parameters)) for m in net]
    strategy = STRATEGIES[f"{METHODS[method].strategy_prefix}AllFineTuningStrategy"]()
    planned = plan_fine_tuning(net, strategy)
    broken_half_way(net, ma_adapt(method))
    now = [(type(m), {k: id(v) for k, v in vars(m).items()}, list(m._parameters)) for m in net]
    assert now == looks
    assert_same_bits(net, before)
    assert torch.equal(net(x), output)
    assert planned.trainable_after == enable_fine_tuning(net, strategy).trainable_after


@of_every_kind
def test_the_report_counts_the_weights_not_their_bytes(kind: Kind) -> None:
    net = kind.network()
    assert shape_of(net[0].weight) == (128, 64)
    plan = plan_fine_tuning(net, STRATEGIES["LoRAAllFineTuningStrategy"]())
    assert plan.total_before == 2 * 64 * 128 + 64 + 128


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "PiSSA"])
@of_some_kinds
def test_sizes_for_a_budget(kind: Kind, method: str) -> None:
    net = kind.network()
    strategy = STRATEGIES[f"{METHODS[method.lower()].strategy_prefix}AllFineTuningStrategy"]()
    suggestion = suggest(net, 2000, strategy)
    assert 1500 < enable_fine_tuning(net, suggestion.strategy).trainable_after <= 2000


def test_what_cannot_be_adapted_is_reported_of_all_layers_at_once() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    foreign = nn.Linear(8, 8)
    foreign.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    layers = {
        "waiting": bitsandbytes.Linear4bit(8, 8),
        "anew": bitsandbytes.Linear8bitLt(8, 8),
        "foreign": foreign,
    }
    expected = (
        r"waiting.* Params4bit that is not quantised yet: move the network to its device(.|\n)*"
        r"anew.* Int8Params that is not quantised yet: make the layer with has_fp16_weights=False"
        r"(.|\n)*foreign.* torch.int8, expected .* torchao or bitsandbytes"
    )
    with pytest.raises(ValueError, match=expected):
        adapt(nn.ModuleDict(layers), "lora")


def test_quantised_too_late() -> None:
    """What is there to quantise is the effective weight: the delta would count twice."""
    net, x = adapt(nn.Sequential(plain_linear(64, 128)), "lora"), inputs()
    train(net)
    output = net(x)
    with pytest.raises(RuntimeError, match="quantise it before enable_fine_tuning"):
        KINDS["torchao int8"].quantise(net)  # type: ignore[arg-type]
    assert torch.equal(net(x), output)


# What merging needs.


@pytest.mark.parametrize("name", KINDS)
def test_another_value_quantised_in_the_same_way(name: str) -> None:
    """As if the layer had had that value from the beginning."""
    kind = KINDS[name]
    layer, other = kind.linear(64, 128), kind.linear(64, 128, seed=7)
    value = plain_linear(64, 128, seed=7).weight.detach()
    if "scaled" in name:  # its scales were fitted together with the weight
        with pytest.raises(AdaptationError, match="Int8Tensor cannot be quantised again"):
            requantised(layer.weight, value)
        return
    new = requantised(layer.weight, value)
    assert isinstance(new, nn.Parameter)
    assert not new.requires_grad
    assert type(new) is type(layer.weight)
    assert all(torch.equal(a, b) for a, b in zip(parts(new), parts(other.weight), strict=True))
    x = inputs()
    expected = other(x)
    layer.weight, layer.bias = new, other.bias
    assert torch.equal(layer(x), expected)


@of_every_kind
def test_dequantised_by_gift_and_by_its_package(kind: Kind) -> None:
    layer = kind.linear(64, 128)
    for _ in range(2):
        assert is_quantised(layer.weight)
        assert_near(dequantised(layer.weight, layer), kind.dequantise(layer), 1e-6)
        layer(inputs())  # after which some have moved their scales
    plain = plain_linear(4, 4).weight
    assert dequantised(plain) is plain
    with pytest.raises(AdaptationError, match="cannot be quantised again"):
        requantised(plain, plain)


# Other layers and real models.


def embedding_of_torchao(config: Callable[[Any], Any]) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Embedding(10, 64))
    torchao.quantize_(net, config(torchao), lambda module, path: isinstance(module, nn.Embedding))
    return net


EMBEDDINGS: dict[str, Callable[[], Any]] = {
    "torchao int8": lambda: embedding_of_torchao(lambda ao: ao.Int8WeightOnlyConfig()),
    "torchao int4 in int8": lambda: embedding_of_torchao(four_bits_in_eight),
    "bitsandbytes nf4": lambda: nn.Sequential(
        pytest.importorskip("bitsandbytes").nn.EmbeddingNF4(10, 64)
    ).to("cpu"),
    "bitsandbytes int8": lambda: nn.Sequential(
        pytest.importorskip("bitsandbytes").nn.Embedding8bit(10, 64)
    ).to("cpu"),
}


@cells(make=EMBEDDINGS, method=[*METHODS])
def test_embeddings(make: Callable[[], Any], method: str) -> None:
    net, tokens = make(), torch.tensor([[1, 2, 1], [9, 0, 3]])
    base, weight = net(tokens), net[0].weight
    adapt(net, method)
    assert_near(net(tokens), base, EXACT)
    train(net)
    output = net(tokens)
    assert_near(output, net[0].weight[tokens], EXACT)
    output.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    state = net.state_dict()
    own = {key.removeprefix("0.") for key in without_settings(state)}
    assert own <= set(added_names(net[0]))
    net.load_state_dict(state)
    assert disable_fine_tuning(net)[0].weight is weight
    assert torch.equal(net(tokens), base)


def test_four_bits_that_the_layer_has_packed_for_its_cpu() -> None:
    """The layer reorders a weight in its first call for inference, where the CPU can do bf16;
    it then has no gradient any more, and its own function cannot dequantise it.
    """
    layer, x = KINDS["bitsandbytes nf4"].linear(64, 128), inputs()
    matrix = matrix_of_4_bits(layer)
    with torch.no_grad():
        base = layer.eval()(x)
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no such kernel")
    bf16 = 2**-7
    adapt(layer, "lora")
    assert torch.equal(layer(x), base)
    assert_near(layer.weight, matrix, bf16)
    layer.train()(x.requires_grad_()).sum().backward()
    assert_near(x.grad, matrix.sum(0).expand_as(x), bf16)
    new = requantised(layer._parameters["weight"], matrix)
    assert new is not None
    assert_near(dequantised(new), matrix, bf16)


def test_scales_that_were_quantised_twice_are_so_again() -> None:
    """Where the kernel for the CPU has flattened them, the state tells what they were."""
    layer = KINDS["bitsandbytes nf4"].linear(64, 128)
    state, matrix = layer.weight.quant_state, matrix_of_4_bits(layer)
    assert state.nested
    assert requantised(layer.weight, matrix).quant_state.nested
    state.original_nested, state.nested = True, False
    assert requantised(layer.weight, matrix).quant_state.nested
    state.original_nested = False
    assert not requantised(layer.weight, matrix).quant_state.nested


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def bits_of_bitsandbytes(folder: Any, **options: Any) -> Any:
    """As its users load them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(**options)
    load = transformers.AutoModelForCausalLM.from_pretrained
    where = {"device_map": {"": "cpu"}, "torch_dtype": torch.float32}
    try:
        return load(folder, quantization_config=config, **where)
    except (AttributeError, RuntimeError) as error:
        if not transformers.__version__.startswith("4."):
            raise
        pytest.skip(f"transformers {transformers.__version__} loads none on CPUs: {error}")


MODELS: dict[str, Callable[[Any], Any]] = {
    "llama int8": lambda folder: KINDS["torchao int8"].quantise(llama()),
    "llama int4": lambda folder: KINDS["torchao int4"].quantise(llama()),
    "llama nf4 of bitsandbytes": lambda folder: bits_of_bitsandbytes(
        folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "llama int8 of bitsandbytes": lambda folder: bits_of_bitsandbytes(folder, load_in_8bit=True),
    "bert int8": lambda folder: KINDS["torchao int8"].quantise(bert()),
}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_language_models_learn(make: Callable[[Any], Any], method: str, tmp_path: Any) -> None:
    net = make(tmp_path).train()
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return net(input_ids=tokens, labels=tokens).loss

    base, before = loss(), packed(net)
    adapt(net, method)
    assert torch.equal(loss(), base)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(6):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < base - 0.02
    assert not {key for key in net.state_dict() if "weight" in key or "SCB" in key}
    if hasattr(net, "generate") and "Causal" in type(net).__name__:
        longer = net.eval().generate(tokens[:2, :4], max_new_tokens=4, min_new_tokens=4)
        assert longer.shape == (2, 8)
    assert_same_bits(net, before)
    disable_fine_tuning(net.train())
    assert torch.equal(loss(), base)


def test_neither_package_is_imported_by_gift() -> None:
    code = "import sys, gift; sys.exit(bool({'torchao', 'bitsandbytes'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# By gift, or by torch where packed values are integers to it.
_UNTRAINABLE = "weight: its values are packed|only Tensors of floating point"


@of_every_kind
def test_packed_weights_are_not_trained_as_they_are(kind: Kind) -> None:
    """No gradient reaches them."""
    for strategy in (
        FineTuningStrategy(para_caps=[(pc_name("weight"), pa_train())]),
        FineTuningStrategy([(mc_path("0"), ma_train())]),
        FineTuningStrategy([(mc_path("0"), lambda *place: place[-1].weight.requires_grad_())]),
    ):
        net = kind.network()
        before = {name: (p, p.requires_grad) for name, p in net.named_parameters()}
        with pytest.raises((AdaptationError, RuntimeError), match=_UNTRAINABLE):
            enable_fine_tuning(net, strategy)
        after = {name: (p, p.requires_grad) for name, p in net.named_parameters()}
        assert all(after[n][0] is p and after[n][1] == flag for n, (p, flag) in before.items())
        assert type(net[0]) is type(kind.linear(64, 128))


@of_some_kinds
def test_biases_beside_packed_weights_are_trained(kind: Kind) -> None:
    net = kind.network()
    enable_fine_tuning(net, BitFitFineTuningStrategy())
    net(torch.randn(2, 64)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
