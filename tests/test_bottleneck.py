"""Bottleneck adapters on every kind of module: the same start, the formula, the way back."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gift import disable_fine_tuning, enable_fine_tuning
from gift.methods import AdaptationError
from gift.strategies import BottleneckFineTuningStrategy as Bottlenecks
from tests.cases.calls import ACTS, CASES, CallCase, encoder, encoder_layer, first, hooked, padded
from tests.common import bits, picture, trainable

KEYS = ["down_weight", "down_bias", "up_weight", "up_bias"]
every_module = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both_ways = pytest.mark.parametrize("parallel", [False, True], ids=["after", "beside"])


def extended(case: CallCase, net: nn.Module, **settings: Any) -> Any:
    """`net`, with a bottleneck of width 3 at the place of the case."""
    enable_fine_tuning(net, Bottlenecks(3, after=case.after, **case.settings, **settings))
    return net


def parameters(net: nn.Module, case: CallCase) -> dict[str, nn.Parameter]:
    module = net.get_submodule(case.after)
    return {key: getattr(module, f"bottleneck_{key}") for key in KEYS}


def fill(net: nn.Module) -> None:
    """As after some training: nothing is zero any more."""
    for parameter in net.parameters():
        parameter.data.normal_()


def tensors(output: Any) -> list[Tensor]:
    found = tree_leaves(vars(output) if hasattr(output, "label") else output)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def double(x: Any) -> Any:
    return x.double() if x is not None and first(x).is_floating_point() else x


def called(net: nn.Module, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(5)  # for dropout
    return net(*inputs)


def skip_parallel(case: CallCase, parallel: bool) -> bool:
    """Whether it is refused; then that is proven."""
    if not (parallel and case.alone):
        return False
    net = case.make()
    before = picture(net)
    with pytest.raises(AdaptationError, match=case.alone):
        extended(case, net, parallel=True)
    assert picture(net) == before
    return True


# --- the start -----------------------------------------------------------------------------------


@every_module
@both_ways
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_network_starts_as_it_was(case: CallCase, parallel: bool, mode: bool) -> None:
    """Bit for bit; the base is frozen, as torch chooses kernels by what needs a gradient."""
    if skip_parallel(case, parallel):
        return
    base = case.make().train(mode).requires_grad_(False)
    net = extended(case, copy.deepcopy(base), parallel=parallel)
    inputs = case.inputs()
    with torch.no_grad():
        output, expected = called(net, inputs), called(base, inputs)
    assert type(output) is type(expected)
    assert [bits(t) for t in tensors(output)] == [bits(t) for t in tensors(expected)]
    after = net.get_submodule(case.after)
    assert all(not getattr(after, f"bottleneck_{key}").any() for key in KEYS[1:])
    assert after.bottleneck_down_weight.std() > 0


class Seen(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **kwargs or {})


def test_a_layer_keeps_its_fused_kernel_and_an_outer_one_gives_way() -> None:
    def operations(after: str) -> set[str]:
        net = encoder_layer().eval()
        enable_fine_tuning(net, Bottlenecks(3, after=after))
        with torch.no_grad(), Seen() as seen:
            net(torch.randn(2, 5, 8))
        return seen.names

    assert "_transformer_encoder_layer_fwd" in operations("")
    assert "_transformer_encoder_layer_fwd" not in operations("self_attn")


SPECIAL = torch.tensor([[0.0, -0.0, 1e-45, float("inf"), -float("inf"), float("nan"), 3e38, 1.0]])


@both_ways
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("scaling", [1.0, -2.5])
def test_every_number_starts_as_it_was(parallel: bool, activation: str, scaling: float) -> None:
    """Signs of zeros, infinities and NaN included."""
    net, plain = nn.Identity(), SPECIAL.T.repeat(1, 3)
    settings = {"activation": activation, "parallel": parallel, "scaling": scaling, "dim": 3}
    enable_fine_tuning(net, Bottlenecks(4, after="", **settings))
    output = net(plain.clone())
    numbers = ~plain.isnan()
    assert bits(output[numbers]) == bits(plain[numbers])
    assert output[plain.isnan()].isnan().all()


# --- the formula ---------------------------------------------------------------------------------


def assert_formula(
    case: CallCase, net: nn.Module, base: nn.Module, inputs: Any, parallel: bool = False,
    activation: str = "gelu", scaling: float = 1.0,
) -> None:  # fmt: skip
    """Value, and gradients of the new parameters and of the input, as autograd gives them."""
    fill(net)
    mine = parameters(net, case)
    theirs = {key: p.detach().clone().requires_grad_() for key, p in mine.items()}
    hooked(base, case.after, theirs, activation, scaling, parallel, case.axis)
    results = []
    for network, p in ((net, mine), (base, theirs)):
        given = copy.deepcopy(inputs)
        x = first(given[0])
        leaves = [*p.values(), *([x.requires_grad_()] if x.is_floating_point() else [])]
        out = first(called(network, given))
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().sum() > 0 for gradient in results[0])


@every_module
@both_ways
def test_value_and_gradient_are_those_of_the_formula(case: CallCase, parallel: bool) -> None:
    if case.alone and parallel:
        return
    base = case.make().double().eval()
    net = extended(case, copy.deepcopy(base), parallel=parallel, dtype=torch.float64)
    inputs = tuple(map(double, case.inputs()))
    if case.after == "" and type(net).__name__ == "GRU":
        inputs = (inputs[0].double(),)  # a packed sequence
    assert_formula(case, net, base, inputs, parallel)
    net.zero_grad()
    first(net(*inputs)).sum().backward()
    assert trainable(net) == [name for name, p in net.named_parameters() if p.grad is not None]


@both_ways
@pytest.mark.parametrize("activation", ACTS)
def test_activation_and_scaling(activation: str, parallel: bool) -> None:
    case = CASES["conv2d"]
    base = case.make().double()
    settings: dict[str, Any] = {"activation": activation, "scaling": 4.0, "parallel": parallel}
    net = extended(case, copy.deepcopy(base), **settings)
    assert_formula(case, net, base, (torch.randn(2, 6, 8, 7, dtype=torch.float64),), **settings)


def test_dropout_is_on_the_bottleneck_in_training() -> None:
    case, x = CASES["linear"], torch.randn(4, 6, dtype=torch.float64)
    base = case.make().double()
    net = extended(case, copy.deepcopy(base), dropout=0.5, activation="identity")
    fill(net)
    p = parameters(net, case)
    hidden = base(x) @ p["down_weight"].T + p["down_bias"]
    torch.manual_seed(3)
    kept = nn.functional.dropout(torch.ones_like(hidden), 0.5)
    torch.manual_seed(3)
    output = net.train()(x)
    expected = base(x) + (hidden * kept) @ p["up_weight"].T + p["up_bias"]
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(net.eval()(x), output)


@pytest.mark.parametrize("after", ["layers.?", "*.self_attn", "*.linear1", "*.norm1", "*.dropout1"])
@pytest.mark.parametrize("gradients", [False, True])
def test_fused_kernels_and_nested_tensors_see_the_adapters(after: str, gradients: bool) -> None:
    """An encoder in evaluation mode gives the formula, for padded batches too.

    Without gradients it packs them as nested tensors and puts zeros where there is padding.
    """
    base, inputs = encoder().eval(), padded()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, Bottlenecks(3, after=after, dim=12 if "linear1" in after else 8))
    fill(net)
    for path, module in net.named_modules():
        if hasattr(module, "bottleneck_up_bias"):
            p = {key: getattr(module, f"bottleneck_{key}") for key in KEYS}
            hooked(base, path, p, "gelu", 1.0, False, -1)
    with torch.set_grad_enabled(gradients):
        output, visible = net(*inputs), ~inputs[2]
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = base(*inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(output[visible], expected[visible])
    assert gradients or not output[~visible].any()


def test_a_parallel_one_reads_its_input_before_the_module_changes_it() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    base, x = copy.deepcopy(net), torch.randn(3, 4)
    enable_fine_tuning(net, Bottlenecks(2, parallel=True, after="", activation="identity"))
    fill(net)
    with torch.no_grad():
        hidden = x @ net.bottleneck_down_weight.T + net.bottleneck_down_bias
        delta = hidden @ net.bottleneck_up_weight.T + net.bottleneck_up_bias
        torch.testing.assert_close(net(x.clone()), base(x.clone()) + delta)


def test_arguments_by_name_come_in_the_order_of_the_signature() -> None:
    case = CASES["attention"]
    net = extended(case, case.make(), parallel=True)
    fill(net)
    query, key, value = case.inputs()
    by_name = net(value=value, key=key, query=query)[0]
    assert torch.equal(by_name, net(query, key, value)[0])


# --- precision -----------------------------------------------------------------------------------


@both_ways
def test_a_base_in_bfloat16_is_rounded_once(parallel: bool) -> None:
    base, x = nn.Linear(64, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, Bottlenecks(4, parallel=parallel, after="", activation="tanh"))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    fill(net)
    p = {key: getattr(net, f"bottleneck_{key}").double() for key in KEYS}
    f = base(x)
    z = (x if parallel else f).double()
    exact = torch.tanh(z @ p["down_weight"].T + p["down_bias"]) @ p["up_weight"].T + p["up_bias"]
    output = net(x)
    assert output.dtype == torch.bfloat16
    # A float32 result lies next to a border between two bfloat16 numbers once in a long while.
    once, twice = (f.double() + exact).bfloat16(), f + exact.bfloat16()
    assert (output != once).float().mean() < 0.002
    assert (once != twice).float().mean() > 0.02, "the test can tell the difference"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_the_dtype_of_the_parameters(dtype: Any) -> None:
    net = nn.Linear(6, 5)
    enable_fine_tuning(net, Bottlenecks(3, after="", dtype=dtype))
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in net.parameters()} == {expected}
    assert net(torch.randn(2, 6)).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "conv2d", "bert_layer", "encoder_layer"])
def test_under_autocast(name: str) -> None:
    """Products in the lower precision, the start is that of the base, gradients are float32."""
    case = CASES[name]
    base = case.make().eval().requires_grad_(False)
    net, inputs = extended(case, copy.deepcopy(base)), case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = first(net(*inputs)), first(base(*inputs))
    assert bits(output) == bits(expected)
    fill(net)
    with torch.autocast("cpu", torch.bfloat16):
        changed = first(net(*inputs))
        changed.float().sum().backward()
    assert changed.dtype == output.dtype
    assert not torch.equal(changed, output)
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


# --- copies, the way back ------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_independent(case: CallCase, way: str) -> None:
    net = extended(case, case.make()).eval()
    fill(net)
    twin = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    inputs = case.inputs()
    before = first(net(*inputs))
    assert bits(first(twin(*inputs))) == bits(before)
    fill(twin)
    assert bits(first(net(*inputs))) == bits(before)
    assert not torch.equal(first(twin(*inputs)), before)


@every_module
def test_the_way_back(case: CallCase) -> None:
    net = case.make().eval()
    net.get_submodule(case.after).register_forward_hook(lambda *args: None)
    before = picture(net)
    extended(case, net)
    fill(net)
    net(*case.inputs())
    assert picture(net) != before
    disable_fine_tuning(net)
    assert picture(net) == before


@every_module
def test_signature_and_class_stay(case: CallCase) -> None:
    base = case.make()
    net = extended(case, copy.deepcopy(base))
    one, other = net.get_submodule(case.after), base.get_submodule(case.after)
    assert inspect.signature(one.forward) == inspect.signature(other.forward)
    assert isinstance(one, type(other))
    assert type(one).__name__ == type(other).__name__


def test_hooks_of_users_see_what_the_extended_module_gives() -> None:
    net, seen = nn.Linear(4, 4), []
    net.register_forward_hook(lambda module, args, output: seen.append(output))
    enable_fine_tuning(net, Bottlenecks(2, after=""))
    fill(net)
    output = net(torch.randn(2, 4))
    assert [s is output for s in seen] == [True]


def test_compiled_as_one_graph() -> None:
    net: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    enable_fine_tuning(net, Bottlenecks(2, after=["0", "2"]))
    fill(net)
    compiled: Callable[[Tensor], Tensor] = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), net(x))
