"""What others do to a fine-tuned network, or hand to gift: it works, or is refused unchanged."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gift
from gift.strategies import BottleneckFineTuningStrategy, LoRAAllFineTuningStrategy

from .common import enabled

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_parametrised_bias_must_be_plain_before_disabling_or_merging() -> None:
    base = _net()
    net = enabled(copy.deepcopy(base), LoRAAllFineTuningStrategy(rank=1))
    tuned = net(X)
    parametrize.register_parametrization(net[0], "bias", Doubled())
    moved = net(X)
    with torch.no_grad():
        expected = nn.functional.linear(X, net[0].weight, 2 * base[0].bias)
    torch.testing.assert_close(moved, net[2](expected.relu()))
    for refused in (gift.disable_fine_tuning, gift.merge):
        with pytest.raises(RuntimeError, match=r"the class of \['0'\] was changed"):
            refused(net)
    with pytest.raises(RuntimeError, match="was changed since"), gift.disabled(net):
        pass
    assert torch.equal(net(X), moved)
    parametrize.remove_parametrizations(net[0], "bias", leave_parametrized=False)
    assert torch.equal(net(X), tuned)
    assert torch.equal(gift.disable_fine_tuning(net)(X), base(X))


def _bound(module: Any) -> None:
    """As accelerate's hooks do."""
    module._old_forward = module.forward
    module.forward = functools.update_wrapper(
        lambda *args, **kwargs: module._old_forward(*args, **kwargs), module.forward
    )


def _closed_over(module: Any) -> None:
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8)), LoRAAllFineTuningStrategy(rank=1), X),
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(8, 4, 1)),
        LoRAAllFineTuningStrategy(rank=1),
        torch.randn(2, 8, 5),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4)),
        LoRAAllFineTuningStrategy(rank=1),
        torch.arange(4),
    ),
    "bottleneck": (
        lambda: nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(2))
        ),
        BottleneckFineTuningStrategy(),
        torch.randn(2, 3, 8),
    ),
}


@pytest.mark.parametrize("wrap", [_bound, _closed_over])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_forward_that_was_set_on_the_instance(layer: str, wrap: Any) -> None:
    make, strategy, x = LAYERS[layer]
    torch.manual_seed(0)
    base = make()
    net = copy.deepcopy(base)
    gift.enable_fine_tuning(net, strategy)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    tuned = net(x)
    wrap(net[0])
    assert torch.equal(net(x), tuned)
    with gift.disabled(net):  # where frozen parameters let torch take other kernels
        torch.testing.assert_close(net(x), base(x))
    assert torch.equal(net(x), tuned)
    if layer != "bottleneck":
        with gift.merged(net):
            torch.testing.assert_close(net(x), tuned)
        assert torch.equal(net(x), tuned)
    gift.disable_fine_tuning(net)
    assert torch.equal(net(x), base(x))


def _mapped(folder: Path, shape: tuple[int, int]) -> Tensor:
    """A tensor in a file that is mapped to be read: to write to it ends the process."""
    numpy = pytest.importorskip("numpy")
    numpy.save(folder / "weight.npy", numpy.random.default_rng(0).random(shape, numpy.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written
        return torch.from_numpy(numpy.load(folder / "weight.npy", mmap_mode="r"))


@pytest.mark.parametrize("kind", ["mapped", "expanded"])
def test_weights_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    weight = _mapped(tmp_path, (4, 8)) if kind == "mapped" else torch.randn(1, 8).expand(4, 8)
    net = nn.Sequential(nn.Linear(8, 4))
    net[0].weight = nn.Parameter(weight)
    before, value = net(X), weight.clone()
    enabled(net, LoRAAllFineTuningStrategy(rank=1))
    tuned = net(X)
    with gift.merged(net):
        torch.testing.assert_close(net(X), tuned)
    with gift.disabled(net):
        assert torch.equal(net(X), before)
    other = copy.deepcopy(net)
    torch.testing.assert_close(gift.disable_fine_tuning(other)(X), before)
    gift.merge(net)
    torch.testing.assert_close(net(X), tuned)
    assert torch.equal(weight, value)
    gift.enable_fine_tuning(net, gift.strategies.FullFineTuningStrategy())
    gift.disable_fine_tuning(net)
    torch.testing.assert_close(net(X), tuned)


def test_a_mapped_weight_that_is_trained_as_it_is_comes_back(tmp_path: Path) -> None:
    """Nobody trained it, so nobody writes to it."""
    net = nn.Linear(8, 4)
    net.weight = nn.Parameter(_mapped(tmp_path, (4, 8)))
    before = net(X)
    gift.enable_fine_tuning(net, gift.strategies.FullFineTuningStrategy())
    gift.disable_fine_tuning(net)
    assert torch.equal(net(X), before)


def test_offloaded_weights_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = accelerate.cpu_offload(_net(), execution_device=torch.device("cpu"))
    before = net(X)
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert torch.equal(net(X), before)
