"""The fast path of linear layers with a low-rank delta, against the formula written out.

The reference is ``x (W + s B A)^T + b`` by torch's own product, differentiated by plain autograd.
"""

# ruff: noqa: B023 - functions are called in the turn of the loop that makes them

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, mc_any, mc_layer
from gift.kernels import thin
from gift.kernels.cost_model import FORMS, Form
from gift.kernels.low_rank_linear import LowRankLinear
from gift.strategies import LoRALinearFineTuningStrategy
from tests.common import bytes_kept, per_example_gradients, weighted

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
]

ORDERS = {"factor first": thin.THIN, "rows first": 0}


@pytest.fixture(autouse=True, params=ORDERS.values(), ids=ORDERS)
def _order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which comes first in products with a factor: its rank decides, and is small in most tests."""
    monkeypatch.setattr(thin, "THIN", request.param)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
INPUTS, OUTPUTS = 6, 5


def adapted(base: nn.Module, method: str = "lora", std: float = 0.3, **settings: Any) -> Any:
    """A copy of `base` with deltas on its linear layers, as after some training."""
    net = copy.deepcopy(base)
    check = mc_any() if isinstance(net, nn.Linear | Conv1D) else mc_layer("linear")
    enable_fine_tuning(net, FineTuningStrategy([(check, ma_adapt(method, **settings))]))
    with torch.no_grad():
        for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
            if "lora_" in name:
                tensor += std * torch.randn_like(tensor)
    return net


def effective(layer: Any) -> Tensor:
    """``W + s B A``, outputs as rows."""
    frozen = layer._parameters["weight"]
    frozen = frozen.T if isinstance(layer, Conv1D) else frozen
    scaling = layer._gift_weights["weight"].method.scaling
    return frozen + scaling * torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A)


def formula(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, effective(layer), layer.bias)


def materialised(base: nn.Module, net: nn.Module) -> Callable[..., Tensor]:
    """The plain network with weights that are functions of the deltas of `net`."""
    given = {name: p.detach() for name, p in base.named_parameters()}
    for path, module in net.named_modules():
        if hasattr(module, "lora_A"):
            weight = effective(module)
            given[f"{path}.weight".lstrip(".")] = weight.T if isinstance(module, Conv1D) else weight
    return lambda *x: functional_call(base, given, x)


def step(call: Callable[[], Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """The output, and gradients."""
    y = call()
    return [y.detach(), *torch.autograd.grad(weighted(y), wanted)]


def trained(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.requires_grad]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Shapes, dtypes, and values relative to the largest."""
    for one, other in zip(found, expected, strict=True):
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * (1 + largest))


def assert_same_step(layer: Any, x: Tensor) -> None:
    """`layer` does as the formula, in its output and all gradients."""
    x = x.detach().requires_grad_()
    wanted = [x, *trained(layer)]
    results = [step(lambda: f(x), wanted) for f in (layer, lambda x: formula(layer, x))]
    assert_same(*results, TOLERANCE[x.dtype])
    with torch.no_grad():
        assert_same([layer(x)], results[1][:1], TOLERANCE[x.dtype])


def linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)


def conv1d(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = Conv1D(OUTPUTS, INPUTS).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


LAYERS: dict[str, Callable[..., nn.Module]] = {"Linear": linear, "Conv1D": conv1d}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
forms = pytest.mark.parametrize("form", FORMS)


def doubled(x: Tensor) -> Tensor:
    """Every other element of memory."""
    return x.repeat_interleave(2, -1)[..., ::2]


SEEN: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "vector": lambda randn: randn(INPUTS),
    "matrix": lambda randn: randn(4, INPUTS),
    "tokens": lambda randn: randn(2, 3, INPUTS),
    "four axes": lambda randn: randn(2, 3, 2, INPUTS),
    "five axes": lambda randn: randn(2, 1, 3, 2, INPUTS),
    "one row": lambda randn: randn(1, INPUTS),
    "no rows": lambda randn: randn(0, INPUTS),
    "no tokens": lambda randn: randn(2, 0, INPUTS),
    "transposed": lambda randn: randn(INPUTS, 4).T,
    "tokens first": lambda randn: randn(3, 2, INPUTS).transpose(0, 1),
    "features first": lambda randn: randn(2, INPUTS, 3).mT,
    "strided": lambda randn: doubled(randn(2, 3, INPUTS)),
    "strided vector": lambda randn: doubled(randn(INPUTS)),
    "expanded": lambda randn: randn(1, 3, INPUTS).expand(2, -1, -1),
    "a row of all": lambda randn: randn(INPUTS).expand(2, 3, -1),
    "sliced": lambda randn: randn(2, 5, INPUTS)[:, 1:4],
    "channels last": lambda randn: randn(2, INPUTS, 3, 4).permute(0, 2, 3, 1),
    "in parts": lambda randn: randn(4, 260, INPUTS),
    "in parts, transposed": lambda randn: randn(130, 8, INPUTS).transpose(0, 1),
    "many rows, but no parts": lambda randn: randn(1025, INPUTS),
}


def seen(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The input of that name."""
    return SEEN[name](functools.partial(torch.randn, dtype=dtype))


@pytest.mark.parametrize("name", SEEN)
@forms
@layers
def test_inputs_of_every_shape_and_memory(build: Any, form: Form, name: str) -> None:
    for dtype, settings in itertools.product(
        TOLERANCE, ({"rank": 1}, {"rank": 5, "lora_alpha": 7.0}, {"rank": 3, "use_rslora": True})
    ):
        assert_same_step(adapted(build(dtype=dtype), form=form, **settings), seen(name, dtype))


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@forms
@layers
def test_biases(build: Any, form: Form, bias: str) -> None:
    layer = build(bias=bias != "none")
    if bias == "none":
        layer.bias = None if isinstance(layer, nn.Linear) else layer.bias
    layer = adapted(layer, train_bias=bias == "trained", form=form)
    assert len(trained(layer)) == 2 + (bias == "trained")
    for name in ("vector", "tokens", "no rows", "in parts"):
        assert_same_step(layer, seen(name))


@forms
@layers
def test_any_tensor_may_be_frozen(build: Any, form: Form) -> None:
    """The gradients that are asked for are right, and no other is made."""
    layer, x = adapted(build(), train_bias=True, form=form), seen("tokens")
    tensors = [x, layer.lora_B, layer.lora_A, layer.bias]
    for flags in itertools.product((True, False), repeat=4):
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        if not wanted:
            assert not layer(x).requires_grad
            continue
        assert_same(step(lambda: layer(x), wanted), step(lambda: formula(layer, x), wanted))


@forms
@layers
def test_gradients_that_are_expanded_or_transposed(build: Any, form: Form) -> None:
    layer, x = (
        adapted(build(), form=form),
        torch.randn(2, 5, INPUTS, dtype=torch.float64, requires_grad=True),
    )
    wanted = [x, *trained(layer)]
    shape = layer(x).shape
    one = torch.ones((), dtype=torch.float64)
    for g in (one.expand(shape), torch.randn(shape).double().mT, doubled(one.expand(shape))):
        found = torch.autograd.grad(layer(x), wanted, g)
        assert_same(found, torch.autograd.grad(formula(layer, x), wanted, g))


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_fa", "pissa", "olora"])
@forms
@layers
def test_methods_of_the_family(build: Any, form: Form, method: str) -> None:
    """Each by its own formula; the anchored ones subtract where they started."""
    base = build()
    layer = adapted(base, method, rank=4, lora_alpha=6.0, form=form)
    scale = 6.0 / (2 if method == "rslora" else 4)

    def by_hand(x: Tensor) -> Tensor:
        change = layer.lora_B @ layer.lora_A
        if method in ("pissa", "olora"):
            change = change - getattr(layer, f"{method}_B0") @ getattr(layer, f"{method}_A0")
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        return F.linear(x, weight.detach() + scale * change, base.bias)

    for name in SEEN:
        x = seen(name).requires_grad_()
        wanted = [x, *trained(layer)]
        assert_same(*(step(lambda: f(x), wanted) for f in (layer, by_hand)), 1e-11)


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "lora_fa", "pissa", "olora"])
@layers
def test_dropout(build: Any, method: str) -> None:
    """With that mask the formula's output and gradients; none in eval."""
    base = build()
    layer = adapted(base, method, rank=3, lora_alpha=5.0, lora_dropout=0.4)
    frozen = base.weight.T if isinstance(base, Conv1D) else base.weight

    def by_hand(x: Tensor) -> Tensor:
        seen = F.dropout(x, 0.4) if layer.training else x
        y = F.linear(x, frozen.detach(), base.bias)
        y = y + F.linear(seen, layer.lora_B @ layer.lora_A) * 5 / 3
        if method in ("pissa", "olora"):
            b, a = getattr(layer, f"{method}_B0"), getattr(layer, f"{method}_A0")
            y = y - F.linear(x, b @ a) * 5 / 3
        return y

    for train, name in itertools.product((True, False), SEEN):
        x = seen(name).requires_grad_()
        layer.train(train)
        for wanted in ([x, *trained(layer)], trained(layer), [x]):
            results = []
            for call in (layer, by_hand):
                torch.manual_seed(3)
                results.append(step(lambda: call(x), wanted))
            assert_same(*results, 1e-11)


# --- derivatives, checkpointing, precision -------------------------------------------------------


@pytest.mark.parametrize(("form", "drops"), [(form, False) for form in FORMS] + [("side", True)])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    form: Form, drops: bool
) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    shapes = [(2, 2, 4), (3,), (3, 2), (2, 4), *([(2, 2, 4)] if drops else [])]
    own = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(x: Tensor, bias: Any, left: Tensor, right: Tensor, dropped: Any = None) -> Tensor:
        return LowRankLinear.apply(x, weight, bias, left, right, 1, dropped, form)

    assert torch.autograd.gradcheck(call, own)
    assert torch.autograd.gradgradcheck(call, own)
    own[1] = None
    assert torch.autograd.gradcheck(call, own)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = (nn.Linear(INPUTS, 8), nn.Tanh(), Conv1D(7, 8), nn.Tanh(), nn.Linear(7, 3, bias=False))
    return nn.Sequential(*layers).to(dtype)


def pair(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
    base = mlp(dtype)
    base[2].weight.data.normal_(std=0.3)  # its own start is next to nothing
    return base, adapted(base, rank=2, **settings)


def rows(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, INPUTS, dtype=dtype)


@forms
def test_gradients_of_gradients_through_a_network(form: Form) -> None:
    """In the input and in the deltas, whichever of them are trained."""
    base, net = pair(form=form)
    for names in (("lora_A", "lora_B"), ("lora_A",)):
        for name, parameter in net.named_parameters():
            parameter.requires_grad = name.endswith(names)
        x, results = rows().requires_grad_(), []
        for call in (net, materialised(base, net)):
            wanted = [x, *trained(net)]
            first = torch.autograd.grad(weighted(call(x)), wanted, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            results.append([*first, *torch.autograd.grad(penalty, wanted)])
        assert_same(*results, 1e-10)


@forms
@layers
def test_lora_fa_keeps_no_input_and_says_so(build: Any, form: Form) -> None:
    """The gradient of its gradient would need one: that is refused in words."""
    layer = adapted(build(), "lora_fa", rank=2, form=form)
    x = torch.randn(50, INPUTS, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    own = {p.untyped_storage().data_ptr() for p in nn.Module.parameters(layer)}
    others = [
        t for t in kept if t.untyped_storage().data_ptr() not in own and t is not layer.lora_A
    ]
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)
    assert max(t.numel() for t in others) == 50 * 2
    assert_same(
        torch.autograd.grad(weighted(y), [x, layer.lora_B]),
        torch.autograd.grad(weighted(formula(layer, x)), [x, layer.lora_B]),
    )
    with pytest.raises(RuntimeError, match="keeps no inputs, so that its gradient has none"):
        torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_B], create_graph=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, dropout: float) -> None:
    base, net = pair(lora_dropout=dropout)
    x, results = rows().requires_grad_(), []
    plain = materialised(base, net) if dropout == 0 else net
    for call in (lambda x: checkpoint(net, x, use_reentrant=reentrant), plain):
        torch.manual_seed(3)
        net.zero_grad()
        x.grad = None
        weighted(call(x)).backward()
        results.append([x.grad, *(p.grad for p in net.parameters())])
    assert_same(*results)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(dropout: float) -> None:
    """The plain layer's dtype, gradients in that of the parameters, all close to float32."""
    base, net = pair(torch.float32, lora_dropout=dropout)
    net.eval()
    x = rows(64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = net(x), base(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    exact = materialised(base, net)(x)
    assert (found - exact).norm() < 0.02 * exact.norm()
    ours, expected = (torch.autograd.grad(y.float().sum(), trained(net)) for y in (found, exact))
    for one, other, parameter in zip(ours, expected, trained(net), strict=True):
        assert one.dtype == parameter.dtype == torch.float32
        assert (one - other).norm() < 0.05 * other.norm()


@layers
def test_autocast_leaves_float64_alone(build: Any) -> None:
    base = build()
    layer, x = adapted(base), rows()
    with torch.autocast("cpu", torch.bfloat16):
        found, plain, expected = layer(x), base(x), formula(layer, x)
    assert found.dtype == plain.dtype
    assert_same([found], [expected.to(plain.dtype)], 1e-12)


@layers
def test_autocast_nested_in_another_and_switched_off(build: Any) -> None:
    layer, x = adapted(build(dtype=torch.float32)), rows(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        found = layer(x)
    assert_same([found], [formula(layer, x)], 1e-6)


@forms
@pytest.mark.parametrize("build", [linear, conv1d, lambda **_: nn.Conv2d(4, 5, 3).double()])
def test_backward_under_another_autocast_than_forward(build: Any, form: Form) -> None:
    """An island of full precision, whose gradient is asked for outside of it."""
    base = build().float()
    net = nn.Sequential(base)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt("lora", rank=2, form=form))]))
    with torch.no_grad():
        net.get_parameter("0.lora_B").normal_()
    shape = (2, 4, 6, 6) if isinstance(base, nn.Conv2d) else (40, INPUTS)
    x, results = torch.randn(shape, requires_grad=True), []
    for outside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            with torch.autocast("cpu", enabled=False):
                y = net(x)
            results.append(torch.autograd.grad(weighted(y), [x, *trained(net)]))
    assert_same(*results, 1e-5)


@layers
def test_a_small_delta_is_not_rounded_away_in_bfloat16(build: Any) -> None:
    """A thousandth of the weight is below what bfloat16 tells apart, but not in the output."""
    base = nn.Linear(1024, 64, bias=False) if build is linear else Conv1D(64, 1024)
    base.weight.data = torch.randn_like(base.weight).sign() * (0.52 + torch.rand_like(base.weight))
    base = base.to(torch.bfloat16)
    layer = adapted(base, rank=1)
    assert layer.lora_A.dtype == torch.float32
    with torch.no_grad():
        layer.lora_A.copy_(layer.lora_A.sign())
        layer.lora_B.fill_(1e-3)
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach()
    change = (layer.lora_B @ layer.lora_A).detach().double()
    merged = weight + change.to(torch.bfloat16)
    assert torch.equal(merged, weight), "all of it would be lost"
    x = layer.lora_A.detach().sign().to(torch.bfloat16)  # to which the delta answers most
    difference, exact = (layer(x) - base(x)).double(), F.linear(x.double(), change)
    left = (difference * exact).sum() / exact.square().sum()
    assert 0.9 < left < 1.1, left


@layers
def test_gradients_on_a_base_of_16_bits(build: Any) -> None:
    """In the dtype of the parameters, and as close as bfloat16 is."""
    layer = adapted(build(dtype=torch.bfloat16), rank=2)
    exact = copy.deepcopy(layer).double()
    x = rows(64)
    found = torch.autograd.grad(layer(x.bfloat16()).float().sum(), trained(layer))
    expected = torch.autograd.grad(formula(exact, x.bfloat16().double()).sum(), trained(exact))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


@layers
def test_factors_of_more_digits_than_the_weight(build: Any) -> None:
    """The sum is rounded once, to the weight's dtype."""
    layer = adapted(build(dtype=torch.float32), dtype=torch.float64, rank=2)
    x = rows(4, torch.float32).requires_grad_()
    found = step(lambda: layer(x), [x, *trained(layer)])
    assert [t.dtype for t in found] == [torch.float32] * 2 + [torch.float64] * 2
    exact = copy.deepcopy(layer).double()
    seen = x.detach().double().requires_grad_()
    expected = step(lambda: formula(exact, seen), [seen, *trained(exact)])
    assert_same([t.double() for t in found], expected, 2e-6)


# --- torch.func, compile, export -----------------------------------------------------------------


def test_per_example_gradients_and_ensembles() -> None:
    base, net = pair()
    x = rows()
    call, own = per_example_gradients(net)
    found = call(own, x)
    for index, one in enumerate(x):
        _, *expected = step(lambda: materialised(base, net)(one[None]), [*own.values()])
        assert_same([g[index] for g in found.values()], expected)

    nets = [net, adapted(base, rank=2), adapted(base, rank=2)]
    stacked, buffers = stack_module_state(nets)
    together = vmap(lambda p, b: functional_call(net, (p, b), (x,)))(stacked, buffers)
    assert_same(together, [materialised(base, one)(x) for one in nets])


def test_jacobians_and_hessians() -> None:
    """Forward mode and both modes together, as plain layers have them."""
    base, net = pair()
    x, plain = rows(1)[0], materialised(base, net)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        assert_same([transform(net)(x)], [transform(plain)(x)], 1e-11)


def test_forward_mode_without_a_transform() -> None:
    """Dual numbers that somebody makes by hand."""
    base, net = pair()
    x, direction, results = rows(), rows(), []
    for call in (net, materialised(base, net)):
        with torch.autograd.forward_ad.dual_level():
            y = call(torch.autograd.forward_ad.make_dual(x, direction))
            results.append([*torch.autograd.forward_ad.unpack_dual(y)])
    assert_same(*results)


def test_gradients_of_a_batch_of_gradients() -> None:
    """`is_grads_batched` runs the backward pass itself under vmap."""
    base, net = pair()
    x, results = rows().requires_grad_(), []
    for call in (net, materialised(base, net)):
        y = call(x)
        directions = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        wanted = [x, *trained(net)]
        results.append(torch.autograd.grad(y, wanted, directions, is_grads_batched=True))
    assert_same(*results)


@pytest.mark.parametrize(
    ("dropout", "counts"), [(0.0, (3, 2, 4)), (0.0, (100, 7000, 400)), (0.5, (3, 700, 5))]
)
def test_compile(dynamo: None, dropout: float, counts: tuple[int, ...]) -> None:
    """In one graph, which serves every size of the batch in one form; gradients as in eager."""
    _, net = pair(lora_dropout=dropout)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in counts:
        stance = "default" if count == counts[0] else "fail_on_recompile"
        x, results = rows(count).requires_grad_(), []
        for call in (compiled, net):
            torch.manual_seed(3)
            with torch.compiler.set_stance(stance):
                results.append(step(lambda: call(x), [x, *trained(net)]))
        assert_same(*results)


@pytest.mark.parametrize("count", [2048, 1028, 1025])
@forms
def test_compile_for_many_rows_alone(dynamo: None, form: Form, count: int) -> None:
    """Of a size that is settled, products are made in as many parts as it has."""
    base, net = pair(form=form)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    x = rows(count).requires_grad_()
    wanted = [x, *trained(net)]
    plain = materialised(base, net)
    assert_same(*(step(lambda: call(x), wanted) for call in (compiled, plain)))


@torch._dynamo.config.patch(compiled_autograd=True)
def test_backward_compiled_alone(dynamo: None) -> None:
    """Of a forward pass that was not compiled, and made what it kept in parts."""
    base, net = pair(form="side")
    x, results = rows(2048), []

    @torch.compile(backend="eager")
    def backward(y: Tensor) -> None:
        y.backward()

    for call, finish in ((net, backward), (materialised(base, net), Tensor.backward)):
        net.zero_grad()
        finish(weighted(call(x)))
        results.append([p.grad for p in net.parameters()])
    assert_same(*results)


def test_on_the_meta_device() -> None:
    """Shapes alone, without an autocast that this device has not."""
    _, net = pair()
    assert net.to("meta")(rows().to("meta")).shape == (4, 3)


def test_compile_of_per_example_gradients(dynamo: None) -> None:
    base, net = pair()
    call, own = per_example_gradients(net)
    x = rows()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(own, x)
    for index, one in enumerate(x):
        _, *expected = step(lambda: materialised(base, net)(one[None]), [*own.values()])
        assert_same([g[index] for g in compiled.values()], expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    base, net = pair()
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(net.eval(), (rows(),), dynamic_shapes=sizes, strict=strict)
    x = rows(7)
    assert_same([exported.module()(x)], [materialised(base, net)(x)])


def test_training_after_inference() -> None:
    base, net = pair()
    x = rows()
    with torch.inference_mode():
        seen = net(x)
    plain = materialised(base, net)
    assert_same([seen], [plain(x)])
    assert_same(*(step(lambda: call(x), trained(net)) for call in (net, plain)))


def test_a_changed_factor_before_backward_is_an_error() -> None:
    """As in torch itself: no gradient of what is no longer there."""
    _, net = pair()
    y = net(rows())
    with torch.no_grad():
        net[4].lora_A += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_may_be_changed_in_place() -> None:
    """As that of a plain layer: by an activation in place, or a sum."""
    base, net = pair()
    x = rows()
    plain = materialised(base, net)
    results = [step(lambda: F.leaky_relu_(call(x).add_(1)), trained(net)) for call in (net, plain)]
    assert_same(*results)


# --- what goes the general way -------------------------------------------------------------------


@layers
def test_a_weight_that_is_trained_under_its_delta(build: Any) -> None:
    layer = adapted(build(), lora_dropout=0.0)
    frozen = layer._parameters["weight"]
    frozen.requires_grad = True
    x = rows().requires_grad_()
    wanted = [frozen, x, layer.lora_B, layer.lora_A]
    found = step(lambda: layer(x), wanted)
    assert found[1].abs().max() > 0
    assert_same(found, step(lambda: formula(layer, x), wanted))


class Cosine(nn.Linear):
    """Multiplies by another matrix than its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Quiet(nn.Linear):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("cls", [Cosine, Quiet, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_subclasses(cls: type[nn.Linear]) -> None:
    base = cls(INPUTS, OUTPUTS, dtype=torch.float64)
    layer, x = adapted(base), rows()
    plain = materialised(base, layer)
    assert_same(*(step(lambda: call(x), trained(layer)) for call in (layer, plain)))


def test_complex_weights() -> None:
    base = nn.Linear(INPUTS, OUTPUTS, dtype=torch.complex128)
    layer = adapted(base, rank=2)
    x = torch.randn(4, INPUTS, dtype=torch.complex128, requires_grad=True)
    wanted, results = [x, layer.lora_B, layer.lora_A], []
    for call in (
        layer,
        lambda x: F.linear(x, base.weight + layer.lora_B @ layer.lora_A, base.bias),
    ):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.abs().square().sum(), wanted)])
    assert_same(*results)


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, INPUTS, dtype=torch.float64)
        self.decoder = nn.Linear(INPUTS, 9, bias=False, dtype=torch.float64)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens).tanh())


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_an_embedding_that_is_tied_to_a_linear_layer(method: str) -> None:
    """One delta serves both, and has the gradients of both."""
    base = Tied()
    net = copy.deepcopy(base)
    strategy = FineTuningStrategy([(mc_any(), ma_adapt(method, rank=2))])
    enable_fine_tuning(net, strategy)
    with torch.no_grad():
        for parameter in trained(net):
            parameter += 0.3 * torch.randn_like(parameter)
    b, a = trained(net)
    tokens = torch.arange(9).view(3, 3)
    change = b @ a
    if method == "pissa":
        change = change - net.embedding.pissa_B0 @ net.embedding.pissa_A0
    table = base.embedding.weight.detach() + change
    expected = F.linear(F.embedding(tokens, table).tanh(), table)
    found = net(tokens)
    assert_same([found.detach()], [expected.detach()], 1e-11)
    results = [torch.autograd.grad(weighted(y), [b, a]) for y in (found, expected)]
    assert_same(*results, 1e-11)


def test_a_quantised_layer() -> None:
    """By its package's kernel; what the matrix stands for is told by the package."""
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Linear(64, 32, bias=True)
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    layer, x = adapted(base, rank=2), torch.randn(4, 64, requires_grad=True)
    weight = base.weight.dequantize().detach()
    wanted, results = [x, layer.lora_B, layer.lora_A], []
    for call in (layer, lambda x: F.linear(x, weight + layer.lora_B @ layer.lora_A, base.bias)):
        results.append(step(lambda: call(x), wanted))
    assert_same(*results, 1e-5)


def test_what_a_plain_layer_refuses_is_refused() -> None:
    """With torch's own words, also where the rows of the factors would fit."""
    base = linear()
    layer = adapted(base)
    for x in (torch.randn(4, INPUTS), torch.randn(4, 7).double(), torch.randn(()).double()):
        with pytest.raises(RuntimeError) as plain:
            base(x)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value).partition("\n")[0] == str(plain.value).partition("\n")[0]


# --- bytes ---------------------------------------------------------------------------------------


def bert(dropout: float = 0.0) -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, max_position_embeddings=32, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


PARTS = ("query", "key", "value", "dense")


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_bytes_kept_for_a_transformer_are_below_those_of_peft(rank: int, scale: float) -> None:
    """On the same layers; what a frozen network keeps anyway is no more than a start."""
    base, tokens = bert(), torch.randint(0, 50, (4, 32))
    settings = {"lora_alpha": scale * rank, "lora_dropout": 0.0}
    config = LoraConfig(r=rank, target_modules=list(PARTS), **settings)
    theirs = get_peft_model(copy.deepcopy(base), config)
    ours = copy.deepcopy(base)
    enable_fine_tuning(ours, LoRALinearFineTuningStrategy(rank=rank, **settings))
    sizes = [sum(p.numel() for p in trained(net)) for net in (ours, theirs)]
    assert sizes[0] == sizes[1], "the same layers"
    assert bytes_kept(ours, tokens) < bytes_kept(theirs, tokens)


@pytest.mark.parametrize(("form", "factor"), [("merged", 0), ("whole", 0), ("side", 2)])
def test_a_layer_keeps_its_input_and_at_most_that_of_its_factor(form: Form, factor: int) -> None:
    """Not even a copy of an input that lies in memory in another order."""
    layer = adapted(nn.Linear(64, 48), rank=2, form=form)
    hidden = torch.randn(3, 10, 64, requires_grad=True) + 1
    for x in (hidden, hidden.transpose(0, 1), hidden[:, ::2], hidden.expand(3, -1, -1)):
        assert bytes_kept(layer, x) == factor * x[..., 0].numel() * 4, (
            "the input itself is not counted"
        )


def test_disabled_again_it_is_the_plain_layer() -> None:
    base, net = pair()
    x = rows()
    assert not torch.equal(net(x), base(x))
    assert torch.equal(disable_fine_tuning(net)(x), base(x))
