"""`gift.reference`: a frozen copy that shares the base."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy, enable_fine_tuning, merge_strategies
from gift.factories import ma_bottleneck, mc_name
from gift.strategies import (
    DoRAAllFineTuningStrategy,
    FullFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    ModulesFineTuningStrategy,
    VeRAAllFineTuningStrategy,
)
from tests.common import full_state


class Net(nn.Module):
    """Layers with buffers, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.down(self.up(x).relu()))


STRATEGIES: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoRAAllFineTuningStrategy(rank=2, lora_dropout=0.3),
    "dora": lambda: DoRAAllFineTuningStrategy(rank=2),
    "vera": lambda: VeRAAllFineTuningStrategy(rank=4),
    "bottleneck": lambda: FineTuningStrategy([(mc_name("down"), ma_bottleneck(4))]),
    "lora and a trained layer": lambda: merge_strategies(
        [ModulesFineTuningStrategy("down"), LoRALinearFineTuningStrategy(rank=2)]
    ),
    "full": FullFineTuningStrategy,
}


def tuned(strategy: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    enable_fine_tuning(net, STRATEGIES[strategy]())
    train(net)
    return net


def train(net: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    net.train()
    for _ in range(steps):
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_stays_what_the_network_was(strategy: str) -> None:
    net, x = tuned(strategy), torch.randn(4, 3, 8, 8)
    before = full_state(net)
    reference = gift.reference(net)
    assert full_state(net) == before
    assert net.training
    expected = copy.deepcopy(net).eval()(x)
    assert torch.equal(reference(x), expected)
    train(net)
    assert torch.equal(reference(x), expected)
    assert not torch.equal(net.eval()(x), expected)
    assert not reference.training
    assert not any(p.requires_grad for p in nn.Module.parameters(reference))
    assert not reference(x).requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_training_changes_is_copied(strategy: str) -> None:
    net = tuned(strategy)
    reference = gift.reference(net)
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in net.named_parameters(remove_duplicate=False):
        shared = parameter.data_ptr() == theirs[name].data_ptr()
        assert shared != parameter.requires_grad, name
        assert theirs[name] is not parameter
    assert theirs["head.weight"] is theirs["up.weight"]
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    assert [id(p) for p in reference.parameters()] == [id(theirs[name]) for name in names]


def test_moving_the_copy_leaves_the_network_alone() -> None:
    net, x = tuned("lora"), torch.randn(4, 3, 8, 8)
    before, reference = full_state(net), gift.reference(net)
    expected = reference(x)
    reference.double()
    torch.testing.assert_close(reference(x.double()).float(), expected)
    reference.to("meta")
    assert full_state(net) == before


def test_it_can_be_saved_merged_and_disabled(tmp_path: Path) -> None:
    net, x = tuned("lora"), torch.randn(4, 3, 8, 8)
    reference = gift.reference(net)
    expected, before = reference(x), full_state(net)
    gift.save(reference, tmp_path / "task.safetensors")
    torch.manual_seed(0)
    fresh = Net()
    gift.load(fresh, tmp_path / "task.safetensors")
    torch.testing.assert_close(fresh.eval()(x), expected)
    torch.testing.assert_close(gift.merge(copy.deepcopy(reference)).eval()(x), expected)
    gift.disable_fine_tuning(reference)
    assert full_state(net) == before


def test_inside_a_bigger_module() -> None:
    outer = nn.Sequential(tuned("lora"), nn.Linear(64, 2))
    reference = gift.reference(outer)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(reference(x), outer.eval()(x))
    assert not any(p.requires_grad for p in reference.parameters())


def test_what_has_no_reference() -> None:
    with pytest.raises(RuntimeError, match="being fine-tuned"):
        gift.reference(Net())
    net = tuned("lora")
    with gift.disabled(net), pytest.raises(RuntimeError, match="disabled"):
        gift.reference(net)


def hashed(module: nn.Module) -> str:
    """As TRL does for `precompute_ref_log_probs`."""
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_its_digest_tells_one_base_from_another() -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = Net()
        torch.manual_seed(5)
        enable_fine_tuning(net, STRATEGIES["lora"]())
        return net

    one, same, other = made(0), made(0), made(1)
    for module in (one, same, other):  # buffers are equal, deltas are equal
        assert hashed(module) == hashed(one)
    assert hashed(gift.reference(one)) == hashed(gift.reference(same))
    assert hashed(gift.reference(one)) != hashed(gift.reference(other))


# --- averages of diffusers ----------------------------------------------------------------------


def test_ema_of_diffusers_pairs_deltas() -> None:
    """Made from the ``parameters()`` of the fine-tuned network, as its loop does."""
    diffusers = pytest.importorskip("diffusers.training_utils")
    net = tuned("lora")
    ema = diffusers.EMAModel(net.parameters(), decay=0.5, min_decay=0.5, use_ema_warmup=False)
    expected = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        train(net, 1)
        ema.step(net.parameters())
        decay = ema.cur_decay_value
        expected = [
            e * decay + p.detach() * (1 - decay)
            for e, p in zip(expected, net.parameters(), strict=True)
        ]
    ema.copy_to(net.parameters())
    for parameter, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
