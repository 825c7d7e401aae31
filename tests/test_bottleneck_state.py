"""Bottleneck adapters: precision, copies, states, and the way back."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.strategies import BottleneckFineTuningStrategy as Bottlenecks
from gift.strategies import LoRAAllFineTuningStrategy
from gift.strategies import PromptFineTuningStrategy as Prompts
from tests.cases.calls import (
    CASES,
    KEYS,
    CallCase,
    both_ways,
    every_module,
    fill,
    first,
    small,
    wrapped,
)
from tests.common import all_bits, bits, frozen_output, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

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
    net, inputs = wrapped(case, copy.deepcopy(base)), case.inputs()
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
    net = wrapped(case, case.make()).eval()
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
    before = full_state(net)
    wrapped(case, net)
    fill(net)
    net(*case.inputs())
    assert full_state(net) != before
    disable_fine_tuning(net)
    assert full_state(net) == before


@every_module
def test_signature_and_class_stay(case: CallCase) -> None:
    base = case.make()
    net = wrapped(case, copy.deepcopy(base))
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


# --- states ---------------------------------------------------------------------------------------


def bottlenecked(base: nn.Module, **settings: Any) -> nn.Module:
    net = copy.deepcopy(base)
    enable_fine_tuning(net, Bottlenecks(**{"size": 3, "after": ["0", "2"]} | settings))
    return net


def test_a_saved_delta_comes_back_bit_for_bit(tmp_path: Any) -> None:
    base, x = small(), torch.randn(2, 8)
    net, fresh = bottlenecked(base), bottlenecked(base)
    fill(net)
    torch.save(net.state_dict(), tmp_path / "delta.pt")
    state = torch.load(tmp_path / "delta.pt")
    assert list(state) == [f"{i}.bottleneck_{key}" for i in (0, 2) for key in KEYS]
    fresh.load_state_dict(state)
    assert all_bits(fresh) == all_bits(net)
    assert torch.equal(fresh(x), net(x))
    assert not torch.equal(fresh(x), base(x))


def dropped(state: dict[str, Any]) -> None:
    del state["2.bottleneck_up_bias"]


def added(state: dict[str, Any]) -> None:
    state["0.bottleneck_gate"] = torch.zeros(1)


# settings of the one that loads, a change of the state, what the error says
MISFITS: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None, str]] = {
    "missing": ({}, dropped, "Missing key.*2.bottleneck_up_bias"),
    "unknown": ({}, added, "Unexpected key.*0.bottleneck_gate"),
    "size": ({"size": 4}, None, "0 was trained with.*'size': 3.*'size': 4"),
    "scaling": ({"scaling": 4.0}, None, "'scaling': 1.0.*'scaling': 4.0"),
    "activation": ({"activation": "relu"}, None, "'activation': 'gelu'.*'relu'"),
    "parallel": ({"parallel": True}, None, "'parallel': False.*'parallel': True"),
    "place": ({"after": ["0"]}, None, "Unexpected key.*2.bottleneck_down_weight"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_delta_that_does_not_fit_is_refused(
    settings: dict[str, Any], change: Callable[[Any], None] | None, message: str
) -> None:
    base = small()
    net, other = bottlenecked(base), bottlenecked(base, **settings)
    fill(net)
    state = net.state_dict()
    if change is not None:
        change(state)
    before = all_bits(other)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        other.load_state_dict(state)
    assert all_bits(other) == before


def test_settings_of_the_same_effect_fit() -> None:
    base = small()
    net = bottlenecked(base)
    fill(net)
    other = bottlenecked(base, dropout=0.5, dim=8, axis=-1, dtype="float32")
    other.load_state_dict(net.state_dict())
    assert all_bits(other) == all_bits(net)


@pytest.mark.parametrize("strategy", [Bottlenecks(3, after="2"), Prompts(3, at="2")], ids=repr)
def test_enabled_where_nothing_is_recorded(strategy: FineTuningStrategy) -> None:
    net = small()
    with torch.inference_mode():
        enable_fine_tuning(net, strategy)
    net(torch.randn(2, 4, 8)).square().sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in net.parameters())


def test_from_the_meta_device() -> None:
    """`to_empty` gives the bottleneck its start, the checkpoint the base."""
    base, x = small(), torch.randn(2, 8)
    with torch.device("meta"):
        net = small()
    enable_fine_tuning(net, Bottlenecks(3, after="2"))
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu").load_state_dict(base.state_dict())
    assert torch.equal(net(x), base(x))
    assert 0 < net[2].bottleneck_down_weight.abs().max() <= 8**-0.5


# --- exporting -----------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (2, 3, 4, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (2, 3, 6, 5)),
    "group norm": (lambda: nn.GroupNorm(1, 3), (2, 3, 6, 5)),
    "linear": (lambda: nn.Linear(5, 4), (2, 3, 5)),
}


@both_ways
@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_older_exporter_to_onnx(
    make: Callable[[], nn.Module], shape: tuple[int, ...], parallel: bool
) -> None:
    """It writes the axes of permutations as they stand, and ONNX knows no negative ones."""
    net, x, file = make().eval(), torch.randn(shape), io.BytesIO()
    enable_fine_tuning(net, Bottlenecks(4, parallel=parallel, after=""))
    fill(net)
    torch.onnx.export(net, (x,), file, dynamo=False)
    session = InferenceSession(file.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), net(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_forward_that_was_kept_is_the_plain_one_afterwards() -> None:
    net, x = nn.Linear(4, 4), torch.randn(3, 4)
    expected = net(x)
    enable_fine_tuning(net, Bottlenecks(2, after=""))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    kept = net.forward
    assert not torch.allclose(kept(x), expected)
    disable_fine_tuning(net)
    torch.testing.assert_close(kept(x), expected, rtol=0, atol=0)


def test_a_wrapper_is_the_base_of_a_stack() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    enable_fine_tuning(net, Bottlenecks(2, after="0"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    lower = {name: value.clone() for name, value in net.state_dict().items()}
    expected = frozen_output(net, x)
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1), stack=True)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == set(net.state_dict()) == {f"{i}.lora_{part}" for i in "01" for part in "AB"}
    torch.testing.assert_close(frozen_output(net, x), expected, rtol=0, atol=0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = dict(nn.Module.named_parameters(net))
    for name, value in lower.items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=0)
    assert not torch.allclose(net(x), expected)
