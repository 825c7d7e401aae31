"""Weights that a schedule trains in a fine-tuned network: gradients, files, and the way back."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import gift
from gift import DeltaFileError, disable_fine_tuning, enable_fine_tuning
from gift.core.unfreeze import refreeze, unfreeze
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_layer
from gift.methods import METHODS, method_of
from gift.schedules import FreezeUnfreeze, NoFreeze, UnfreezeMilestones
from gift.strategies import STRATEGIES, FineTuningStrategy, FullFineTuningStrategy
from tests.common import all_bits, bits, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
READING = [name for name in METHODS if method_of(name, {}).reads_weight]
OTHERS = [name for name in METHODS if name not in READING]
LORA = STRATEGIES["LoRAAllFineTuningStrategy"]
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "n_positions": 8, "n_embd": 16, "n_layer": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_head=2, bos_token_id=0, eos_token_id=0))


def of(method: str) -> FineTuningStrategy:
    return STRATEGIES[f"{METHODS[method].strategy_prefix}AllFineTuningStrategy"]()


def move(net: nn.Module) -> None:
    """As after some steps: all that is trained has moved, statistics too."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1


def unfrozen(net: nn.Module, strategy: FineTuningStrategy | None, **options: Any) -> Any:
    """`net` in the middle of a schedule, its last block unfrozen, all that is trained moved."""
    if strategy is not None:
        enable_fine_tuning(net, strategy, **options)
    schedule = UnfreezeMilestones((1, 3), num_layers=1)
    schedule.attach(net)
    assert len(schedule.step(1)) == 1
    move(net)
    return net


@pytest.mark.parametrize("method", OTHERS)
def test_the_gradient_of_a_weight_under_a_delta_is_the_slope(method: str) -> None:
    """Beside a difference quotient, in double precision, with a delta that has an effect."""
    net = convnet().double().eval()
    enable_fine_tuning(net, of(method))
    move(net)
    weights = ["0.weight", "3.weight", "3.bias", "6.weight"]
    unfreeze(net, weights)

    def loss() -> Tensor:
        return F.cross_entropy(net(IMAGES.double()), torch.arange(4))

    loss().backward()
    for name in weights:
        weight = net.get_parameter(name)
        direction, size = torch.randn_like(weight), 1e-5
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * size * direction
                slopes.append(sign * loss() / (2 * size))
                weight -= sign * size * direction
        assert weight.grad is not None
        slope = (weight.grad * direction).sum()
        assert slope != 0
        torch.testing.assert_close(slope, sum(slopes), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", READING)
def test_a_weight_from_which_a_delta_was_made_must_stay(method: str) -> None:
    """The delta would mean something else where it is loaded: the error says what to do."""
    net = convnet()
    enable_fine_tuning(net, of(method))
    before = full_state(net)
    with pytest.raises(AdaptationError, match=rf"0\.weight: its delta, by {method}, is derived"):
        NoFreeze().attach(net)
    with pytest.raises(AdaptationError, match="nothing was changed"):
        unfreeze(net, ["6.bias", "6.weight"])
    assert full_state(net) == before
    schedule = NoFreeze(unfreezes="deltas")
    if method == "tinylora":  # all layers share one vector, which is trained with the head
        with pytest.raises(ValueError, match="would unfreeze nothing"):
            schedule.attach(net)
    else:
        assert schedule.attach(net).blocks[0].waiting > 0


@pytest.mark.parametrize("method", OTHERS)
def test_a_file_with_unfrozen_blocks_goes_onto_a_fresh_base(method: str, tmp_path: Path) -> None:
    """Bit for bit; its fingerprint of the base is that of a file without them."""
    base, path = convnet(), tmp_path / "delta.safetensors"
    net = copy.deepcopy(base)
    enable_fine_tuning(net, of(method))
    gift.save(net, path)
    fingerprint = gift.inspect(path).base
    schedule = UnfreezeMilestones((1, 3), num_layers=1)
    schedule.attach(net)
    schedule.step(1)
    move(net)
    gift.save(net, path)
    file, fresh = gift.inspect(path), copy.deepcopy(base)
    assert set(file.trained) == {"6.weight", "6.bias", "1.weight", "1.bias"}
    assert file.base == {name: fingerprint[name] for name in file.base}
    gift.load(fresh, path)
    assert list(fresh.state_dict()) == list(net.state_dict())
    assert all_bits(fresh) == all_bits(net)
    assert all_bits(disable_fine_tuning(fresh)) == all_bits(base)


BASES: dict[str, Callable[[], nn.Module]] = {"convnet": convnet, "gpt2": gpt2}
KINDS = {"lora": LORA, "full": FullFineTuningStrategy}
everywhere = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
by_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def call(net: nn.Module) -> Tensor:
    net.eval()
    return net(IMAGES) if isinstance(net, nn.Sequential) else net(TOKENS).logits


@everywhere
@by_kinds
def test_the_base_comes_back(make: Callable[[], nn.Module], kind: Any) -> None:
    base = make()
    net = unfrozen(copy.deepcopy(base), kind())
    trained, output = all_bits(net), call(net)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert not torch.equal(output, call(base))
    with gift.disabled(net):
        assert all_bits(net) == all_bits(base)
        assert torch.equal(call(net), call(base))
    assert all_bits(net) == trained
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    with gift.merged(net):
        torch.testing.assert_close(call(net), output, rtol=1e-4, atol=1e-5)
    assert all_bits(net) == trained
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        merged = gift.merge(copy.deepcopy(twin))
        torch.testing.assert_close(call(merged), output, rtol=1e-4, atol=1e-5)
        plain = disable_fine_tuning(twin)
        assert all_bits(plain) == all_bits(base)
        for after in (merged, plain):
            assert all(p.requires_grad for p in after.parameters())
            assert vars(after).keys() == vars(base).keys()
    assert all_bits(net) == trained


@everywhere
@by_kinds
def test_a_state_has_what_is_trained_and_goes_onto_a_net_that_is_as_far(
    make: Callable[[], nn.Module], kind: Any
) -> None:
    base = make()
    net, fresh = (unfrozen(copy.deepcopy(base), kind()) for _ in range(2))
    state = net.state_dict()
    assert set(state) >= {n for n, p in net.named_parameters() if p.requires_grad}
    assert all_bits(fresh) != all_bits(net)
    fresh.load_state_dict(state)
    assert all_bits(fresh) == all_bits(net)
    gone = next(n for n in state if n.endswith(("6.weight", "ln_f.weight")))
    state.pop(gone)
    with pytest.raises(RuntimeError, match=rf"nothing was loaded(.|\n)*{gone}"):
        fresh.load_state_dict(state)
    assert all_bits(disable_fine_tuning(fresh)) == all_bits(base)


def test_a_whole_base_that_is_loaded_is_the_base_from_then_on() -> None:
    net, other = unfrozen(convnet(), LORA()), convnet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    net.load_state_dict(other.state_dict())
    move(net)
    assert all_bits(disable_fine_tuning(net)) == all_bits(other)


def test_a_state_that_comes_before_its_blocks_are_unfrozen_costs_no_base() -> None:
    """Trainers load a model before they tell anybody what was unfrozen."""
    base = convnet()
    net, fresh = unfrozen(copy.deepcopy(base), LORA()), copy.deepcopy(base)
    enable_fine_tuning(fresh, LORA())
    schedule = UnfreezeMilestones((1, 3), num_layers=1)
    schedule.attach(fresh)
    fresh.load_state_dict(net.state_dict())
    schedule.step(1)
    assert all_bits(fresh) == all_bits(net)
    assert all_bits(disable_fine_tuning(fresh)) == all_bits(base)


def test_training_no_more_gives_the_values_of_the_base() -> None:
    base = convnet()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, LORA())
    names = list(net.state_dict())
    unfreeze(net, ["6.weight", "3.bias"])
    move(net)
    kept = bits(net.get_parameter("3.bias"))
    refreeze(net, ["6.weight"])
    assert bits(net.get_parameter("6.weight")) == bits(base[6].weight)
    assert bits(net.get_parameter("3.bias")) == kept != bits(base[3].bias)
    assert set(net.state_dict()) == {*names, "3.bias"}


def test_without_a_kept_base_there_is_no_way_back() -> None:
    net = unfrozen(convnet(), LORA(), keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        refreeze(net, ["6.weight"])
    with pytest.raises(RuntimeError, match="keep_base=False"):
        disable_fine_tuning(net)


def test_what_waits_stays_frozen_whoever_freezes_and_trains_the_network() -> None:
    """As loops of two networks do it, step by step."""
    net = convnet()
    enable_fine_tuning(net, LORA())
    FreezeUnfreeze(1, unfreezes="deltas").attach(net)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())
    net.requires_grad_(True)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert not flags["0.lora_A"]


def test_a_strategy_of_lambdas_is_saved_with_what_was_unfrozen(tmp_path: Path) -> None:
    """No file can name it: each tensor is named instead."""
    base, path = convnet(), tmp_path / "delta.safetensors"
    caps = [(lambda *place: mc_layer()(*place), ma_adapt("lora"))]
    net, fresh = unfrozen(copy.deepcopy(base), FineTuningStrategy(caps)), copy.deepcopy(base)
    gift.save(net, path)
    gift.load(fresh, path)
    assert all_bits(fresh) == all_bits(net)


def test_a_file_does_not_go_onto_a_network_that_is_further_or_less_far(tmp_path: Path) -> None:
    path, net = tmp_path / "delta.safetensors", unfrozen(convnet(), LORA())
    gift.save(net, path)
    less = convnet()
    enable_fine_tuning(less, LORA())
    before = all_bits(less)
    with pytest.raises(DeltaFileError, match=r"not trained here: .*6\.weight"):
        gift.load(less, path)
    assert all_bits(less) == before


def test_a_plain_network_keeps_nothing_but_its_flags() -> None:
    """Copies and pickles of it are as far; they are plain networks, as it is."""
    net = unfrozen(convnet(), None)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(net), torch.load(stream, weights_only=False)):
        assert all_bits(twin) == all_bits(net)
        assert [p.requires_grad for p in twin.parameters()] == [
            p.requires_grad for p in net.parameters()
        ]
        NoFreeze().attach(twin)
    assert list(net.state_dict()) == list(convnet().state_dict())
