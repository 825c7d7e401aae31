"""Prompt tuning in front of embeddings: precision, copies, the way back, what is refused."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_prompt, mc_path
from gift.strategies import PromptFineTuningStrategy as Prompts
from tests.common import all_bits, bits, full_state
from tests.test_prompt import DIM, TIME, N, Pooled, encoder, layer, prompted

# --- precision, copies, the way back -------------------------------------------------------------


def test_a_base_in_bfloat16() -> None:
    base, x = encoder().bfloat16().eval(), torch.randn(2, TIME, DIM).bfloat16()
    net = prompted(copy.deepcopy(base))
    assert net.prompt_tokens.dtype == torch.float32
    tokens = net.prompt_tokens.detach().bfloat16().expand(2, N, DIM)
    with torch.no_grad():
        assert bits(net(x)) == bits(base(torch.cat([tokens, x], 1))[:, N:])


def test_under_autocast() -> None:
    base, x = encoder().eval().requires_grad_(False), torch.randn(2, TIME, DIM)
    net = prompted(copy.deepcopy(base))
    tokens = net.prompt_tokens.detach().clone().expand(2, N, DIM).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = net(x), base(torch.cat([tokens, x], 1))[:, N:]
    assert bits(output) == bits(expected)
    output.float().sum().backward()
    assert net.prompt_tokens.grad.dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_independent(copied: Callable[[Any], Any]) -> None:
    net, x = prompted(encoder().eval()), torch.randn(2, TIME, DIM)
    twin = copied(net)
    before = net(x)
    assert torch.equal(twin(x), before)
    twin.prompt_tokens.data.normal_()
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)


def test_the_way_back() -> None:
    net = encoder().eval()
    before = full_state(net)
    prompted(net)(torch.randn(2, TIME, DIM))
    disable_fine_tuning(net)
    assert full_state(net) == before


def test_a_saved_delta() -> None:
    base = encoder().eval()
    net, fresh = prompted(copy.deepcopy(base)), prompted(copy.deepcopy(base))
    fresh.load_state_dict(net.state_dict())
    assert list(net.state_dict()) == ["prompt_tokens"]
    assert all_bits(fresh) == all_bits(net)
    for n, settings in ((N + 1, {}), (N, {"batch_first": False}), (N, {"strip": False})):
        other = prompted(copy.deepcopy(base), n, **settings)
        with pytest.raises(RuntimeError, match=r"was trained with.*here it has"):
            other.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*prompt_tokens"):
        fresh.load_state_dict({})


def test_the_signature_stays() -> None:
    net = Pooled()
    before = inspect.signature(net.forward)
    assert inspect.signature(prompted(net).forward) == before


@pytest.mark.parametrize("records", [True, False])
def test_compiled_as_one_graph(records: bool) -> None:
    torch._dynamo.reset()
    net, x = prompted(encoder().eval()), torch.randn(2, TIME, DIM)
    net.enable_nested_tensor = False
    compiled: Any = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(records):
        torch.testing.assert_close(compiled(x), net(x))


# --- what is refused -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tokens": (lambda: nn.Sequential(nn.Embedding(9, DIM), layer()), "takes no embeddings"),
    "pictures": (lambda: nn.Sequential(nn.Conv2d(3, DIM, 1)), "takes no embeddings"),
    "no features": (nn.Flatten, "give dim="),
    "two sequences": (lambda: nn.Transformer(DIM, 2, 1, 1, 12), "wrap its encoder or its decoder"),
    "a list": (lambda: nn.ModuleList([layer()]), "has no forward"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], nn.Module], message: str) -> None:
    net = make()
    before = full_state(net)
    with pytest.raises(ValueError, match=message):
        enable_fine_tuning(net, Prompts(N))
    assert full_state(net) == before


FORWARD_METHODS: dict[str, tuple[tuple[Any, ...], str]] = {
    "integers": (
        (torch.zeros(2, TIME, dtype=torch.long),),
        r"the network \(LSTM\) takes torch.int64",
    ),
    "features": ((torch.zeros(2, TIME, 4),), r"\(2, 5, 4\) .* is for embeddings .*, time, 8\)"),
    "axes": ((torch.zeros(2, 2, TIME, DIM),), r"\(2, 2, 5, 8\)"),
    "packed": ((pack_padded_sequence(torch.zeros(5, 2, DIM), torch.tensor([5, 3])),), "a Packed"),
    "too many": (
        (torch.zeros(2, TIME, DIM), None, None),
        "3 arguments by position, but.*names for",
    ),
}


@pytest.mark.parametrize(("args", "message"), FORWARD_METHODS.values(), ids=FORWARD_METHODS)
def test_a_call_that_does_not_fit(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompted(nn.LSTM(DIM, 6, batch_first=True))(*args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0, expected an integer of at least 1"),
        ({"num_virtual_tokens": 2.0, "dim": -1}, "num_virtual_tokens is 2.0.*; dim is -1"),
        ({"batch_first": 1}, "batch_first is 1, expected True or False"),
        ({"strip": None}, "strip is None"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ma_prompt(**settings)


def test_what_is_given_wins() -> None:
    """The number of features and the order of axes, where the network says otherwise or nothing."""
    net = nn.Sequential(nn.Identity(), nn.LayerNorm(DIM))
    action = ma_prompt(N, dim=DIM, batch_first=False)
    enable_fine_tuning(net, FineTuningStrategy([(mc_path(""), action)]))
    assert net(torch.randn(TIME, 2, DIM)).shape == (TIME, 2, DIM)
    assert net._gift_forwards["prompt"].method.batch_first is False
