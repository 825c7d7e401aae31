"""Bottleneck adapters on every kind of module: the same start, and the formula."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gift import enable_fine_tuning
from gift.errors import AdaptationError
from gift.strategies import BottleneckFineTuningStrategy as Bottlenecks
from tests.cases.calls import (
    ACTS,
    CASES,
    KEYS,
    CallCase,
    both_ways,
    called,
    double,
    encoder,
    encoder_layer,
    every_module,
    fill,
    first,
    hooked,
    padded,
    parameters,
    tensors,
    wrapped,
)
from tests.common import bits, full_state, trainable


def skip_parallel(case: CallCase, parallel: bool) -> bool:
    """Whether it is refused; then that is proven."""
    if not (parallel and case.alone):
        return False
    net = case.make()
    before = full_state(net)
    with pytest.raises(AdaptationError, match=case.alone):
        wrapped(case, net, parallel=True)
    assert full_state(net) == before
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
    net = wrapped(case, copy.deepcopy(base), parallel=parallel)
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
    net = wrapped(case, copy.deepcopy(base), parallel=parallel, dtype=torch.float64)
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
    net = wrapped(case, copy.deepcopy(base), **settings)
    assert_formula(case, net, base, (torch.randn(2, 6, 8, 7, dtype=torch.float64),), **settings)


def test_dropout_is_on_the_bottleneck_in_training() -> None:
    case, x = CASES["linear"], torch.randn(4, 6, dtype=torch.float64)
    base = case.make().double()
    net = wrapped(case, copy.deepcopy(base), dropout=0.5, activation="identity")
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


def test_the_flag_for_nested_tensors_can_be_set() -> None:
    net = encoder().eval()
    enable_fine_tuning(net, Bottlenecks(3, after="layers.?", dim=8))
    for chosen in (True, False, True):
        net.use_nested_tensor = chosen
        with torch.no_grad():
            assert net.use_nested_tensor is chosen
        assert net.use_nested_tensor is False  # wrapped layers need gradients


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
    net = wrapped(case, case.make(), parallel=True)
    fill(net)
    query, key, value = case.inputs()
    by_name = net(value=value, key=key, query=query)[0]
    assert torch.equal(by_name, net(query, key, value)[0])
