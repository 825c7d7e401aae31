"""`find_lr`: the losses are those of a plain loop, and nothing is left behind."""

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gift.schedules import Freeze, NoFreeze, Schedule
from gift.strategies import LoRAAllFineTuningStrategy
from gift.training import TrainingError
from gift.training.lr_finder import LearningRates, find_lr, smooth
from tests.common import enabled, full_state

QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
PLAIN: dict[str, Any] = QUIET | {"optimizer": "SGD", "weight_decay": 0.0, "clip": None}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small() -> nn.Sequential:
    """With everything that training moves: statistics, random numbers, values."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
    )


def examples(number: int = 40) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(number, 6)
    return inputs, inputs[:, :3].argmax(1)


class Drawing(TensorDataset):
    """Reading an example draws from all generators, as augmentation does."""

    def __getitem__(self, place: int) -> Any:
        random.random()
        np.random.rand()
        torch.rand(1)
        return super().__getitem__(place)


NETWORKS = {
    "plain": (small, {}),
    "with a strategy": (small, {"strategy": LoRAAllFineTuningStrategy(rank=1)}),
    "enabled": (lambda: enabled(small(), LoRAAllFineTuningStrategy(rank=1)), {}),
}


@pytest.mark.parametrize(("make", "more"), NETWORKS.values(), ids=NETWORKS.keys())
def test_network_and_random_numbers_are_as_before(make: Any, more: dict[str, Any]) -> None:
    net = make()
    net[1].eval()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    loader = DataLoader(Drawing(*examples()), 8, True, generator=torch.Generator().manual_seed(3))
    before = full_state(net)

    def draws() -> list[Any]:
        own = torch.rand(2, generator=copy.deepcopy(loader.generator)).tolist()
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()
        drawn = [torch.rand(2).tolist(), random.random(), np.random.rand(), own]
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])
        return drawn

    random_before = draws()
    found = find_lr(net, loader, steps=12, **more, **QUIET)
    assert len(found.losses) > 3
    assert full_state(net) == before
    assert draws() == random_before


@pytest.mark.parametrize("schedule", [Freeze(), NoFreeze(lr_ratio=1.0)], ids=repr)
def test_the_schedule_is_that_of_the_first_epoch_and_stays_free(schedule: Schedule) -> None:
    net, data = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)), examples()
    before = full_state(net)
    found = find_lr(net, data, schedule=schedule, **QUIET)
    assert full_state(net) == before
    schedule.attach(copy.deepcopy(net))
    net[0].requires_grad_(isinstance(schedule, NoFreeze))
    expected = find_lr(net, data, **QUIET).losses
    assert found.losses[:60] == pytest.approx(expected[:60], rel=1e-3)  # before rounding grows


def test_nothing_is_left_behind_when_it_fails() -> None:
    net, data = small(), examples()
    before, state = full_state(net), torch.get_rng_state()
    with pytest.raises(TrainingError, match="out of range"):
        find_lr(net, (data[0], data[1] + 1), strategy=LoRAAllFineTuningStrategy(rank=1), **QUIET)
    assert full_state(net) == before
    assert torch.equal(torch.get_rng_state(), state)


def rates_of(lowest: float, highest: float, steps: int) -> list[float]:
    return np.geomspace(lowest, highest, steps).tolist()


def test_losses_are_those_of_a_plain_loop() -> None:
    """All examples in one batch, so that their order does not count."""
    net, (inputs, labels) = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), examples()
    found = find_lr(net, (inputs, labels), batch_size=40, lowest=1e-3, highest=1.0, steps=20,
                    **PLAIN)  # fmt: skip
    expected, parameters = [], list(net.parameters())
    for rate in rates_of(1e-3, 1.0, 20):
        loss = nn.functional.cross_entropy(net(inputs), labels)
        expected.append(loss.item())
        with torch.no_grad():
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p -= rate * gradient
    assert found.rates == pytest.approx(rates_of(1e-3, 1.0, 20))
    assert found.losses == pytest.approx(expected, rel=1e-4)


def test_groups_keep_their_ratio() -> None:
    """LoRA+: B learns 16 times as fast as A."""
    net = enabled(nn.Sequential(nn.Linear(6, 3)), LoRAAllFineTuningStrategy(rank=1))
    inputs, labels = examples()
    found = find_lr(net, (inputs, labels), batch_size=40, lowest=1e-3, highest=0.1, steps=10,
                    loraplus_ratio=16.0, lr=0.7, **PLAIN)  # fmt: skip
    expected = []
    for rate in rates_of(1e-3, 0.1, 10):
        loss = nn.functional.cross_entropy(net(inputs), labels)
        expected.append(loss.item())
        a, b = net[0].lora_A, net[0].lora_B
        of_a, of_b = torch.autograd.grad(loss, [a, b])
        with torch.no_grad():
            a -= rate * of_a
            b -= 16 * rate * of_b
    assert found.losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_epoch_has_all_examples_in_another_order(accumulate: int) -> None:
    """Inputs are one-hot, targets their numbers and the net gives zero: the loss names them."""
    net = nn.Linear(8, 1, bias=False)
    nn.init.zeros_(net.weight)
    counts = [1] * 8 if accumulate == 1 else [3, 3, 2]  # batches in each step
    found = find_lr(net, (torch.eye(8), torch.arange(8) + 10.0), task="regression", batch_size=1,
                    accumulate=accumulate, steps=2 * len(counts), lowest=1e-30, highest=1e-29,
                    **PLAIN)  # fmt: skip
    first, second = found.losses[: len(counts)], found.losses[len(counts) :]
    for losses in (first, second):
        total = sum(count * loss for count, loss in zip(counts, losses, strict=True))
        assert total == pytest.approx(sum(n**2 for n in range(10, 18)))
    assert first != second


@pytest.mark.parametrize("curvature", [10.0, 100.0, 1000.0])
def test_the_suggestion_is_stable_and_not_timid(curvature: float) -> None:
    """Gradient descent on a quadratic diverges beyond 2 / (its largest curvature)."""
    inputs = torch.randn(256, 5) * torch.tensor([1.0, 0.8, 0.7, 0.7, 0.6])
    inputs *= (curvature / 2 / torch.linalg.eigvalsh(inputs.T @ inputs / 256).max()).sqrt()
    net = nn.Linear(5, 1, bias=False)
    found = find_lr(net, (inputs, inputs.sum(1)), task="regression", **PLAIN)
    assert len(found.rates) < 100, "it ends where it diverges"
    assert found.suggestion is not None
    assert 2 / curvature / 300 < found.suggestion < 2 / curvature / 2


def test_it_ends_where_the_loss_is_no_number() -> None:
    class Fragile(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            moved = (self.weight - self.first).abs().max() > 1e-3
            return super().forward(x) * (math.nan if moved else 1.0)

    net = Fragile(6, 3)
    net.register_buffer("first", net.weight.detach().clone())
    found = find_lr(net, examples(), **QUIET)
    assert 3 < len(found.losses) < 100
    assert all(map(math.isfinite, found.losses))


def test_a_wrong_label_is_no_divergence() -> None:
    inputs, labels = examples()
    labels[30] = 7
    with pytest.raises(TrainingError, match=r"\[7\] are out of range"):
        find_lr(small(), DataLoader(TensorDataset(inputs, labels), 8), **QUIET)


def test_a_loss_that_is_no_number_from_the_start_is_an_error() -> None:
    inputs, labels = examples()
    with pytest.raises(TrainingError, match="not finite"):
        find_lr(small(), (inputs * math.nan, labels), **QUIET)


@pytest.mark.parametrize(
    "wrong",
    [{"lowest": 0.0}, {"lowest": 1.0, "highest": 0.1}, {"highest": math.inf}, {"steps": 2}],
)
def test_rates_must_rise(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected them to rise"):
        find_lr(small(), examples(), **wrong, **QUIET)


def test_settings_about_validation_do_not_hinder() -> None:
    found = find_lr(small(), examples(), steps=5, watch="accuracy", patience=3, epochs=1, **QUIET)
    assert len(found.rates) == 5


class Noting(nn.Linear):
    """Notes where the memory of its bias is."""

    places: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.places.add(self.bias.data_ptr())
        return super().forward(x)


def test_only_what_may_be_trained_is_copied() -> None:
    net = nn.Sequential(Noting(6, 3))
    own = net[0].bias.data_ptr()
    find_lr(net, examples(), steps=3, **QUIET)
    assert own not in Noting.places
    find_lr(net.requires_grad_(False), examples(), steps=3, strategy=LoRAAllFineTuningStrategy(
        rank=1, train_bias=True), **QUIET)  # fmt: skip
    assert own not in Noting.places
    Noting.places.clear()
    find_lr(enabled(net, LoRAAllFineTuningStrategy(rank=1)), examples(), steps=3, **QUIET)
    assert Noting.places == {own}


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smooth([3.0] * 7) == pytest.approx([3.0] * 7)
    assert smooth([1.0, 2.0])[1] == pytest.approx((0.9 * 1 + 2) / 1.9)


def curve(losses: list[float]) -> LearningRates:
    return LearningRates(rates_of(1e-7, 10, len(losses)), losses, smooth(losses))


def test_the_suggestion_is_on_the_slope() -> None:
    """A loss that falls at 1e-3, slowly again from 1e-2 and explodes beyond 1."""
    places = np.linspace(-7, 1, 100)
    fall = 1 - 0.9 / (1 + np.exp(-6 * (places + 3))) - 0.01 * (places + 7)
    found = curve((fall + np.where(places > 0, 10**places, 0)).tolist())
    assert found.suggestion is not None
    assert 3e-4 < found.suggestion < 3e-2


@pytest.mark.parametrize("losses", [[1.0] * 9, [1.0, 1.0, 2.0, 4.0, 8.0], [1.0], [0.0] * 4])
def test_without_a_fall_there_is_no_suggestion(losses: list[float], tmp_path: Path) -> None:
    found = curve(losses) if len(losses) > 1 else LearningRates([0.1], losses, smooth(losses))
    assert found.suggestion is None
    assert "never fell" in str(found)
    found.plot(tmp_path / "lr.png")


def test_the_image_is_written(tmp_path: Path) -> None:
    found = find_lr(small(), examples(), **QUIET)
    found.plot(tmp_path / "lr.png")
    with Image.open(tmp_path / "lr.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(10**6)) > 10
