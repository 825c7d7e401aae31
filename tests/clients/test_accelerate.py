"""accelerate: its loop, its states, and weights that it sends elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gift
from gift import enable_fine_tuning
from gift.strategies import LoRAAllFineTuningStrategy
from tests.clients._properties import Client

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

X = torch.linspace(-1, 1, 256).reshape(16, 16)
Y = X[:, :2].sin()


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(X)


def tuned() -> Any:
    net = made()
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


def test_its_loop_and_its_states(tmp_path: Path) -> None:
    net, strategy = made(), LoRAAllFineTuningStrategy(rank=1)
    client = Client(net, lambda: output(net))
    client.enable(strategy)
    loop = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    data = DataLoader(TensorDataset(X, Y), batch_size=16)
    model, optimizer, data = loop.prepare(net, optimizer, data)
    losses = []
    for _ in range(9):
        for x, y in data:
            loss = nn.functional.mse_loss(model.train()(x)[:, :2], y)
            loop.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    def reload() -> Tensor:
        loop.save_state(str(tmp_path))
        fresh = made()
        enable_fine_tuning(fresh, strategy)
        other = accelerate.Accelerator(cpu=True)
        again = other.prepare(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.02))
        other.load_state(str(tmp_path))
        return output(again[0])

    client.check(losses, reload, exact=True)


def offload(net: nn.Module, where: str, folder: Path) -> None:
    """To the processor's memory, to files, or the last layer to files."""
    if where == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    elif where == "disk":
        accelerate.disk_offload(net, str(folder), execution_device=torch.device("cpu"))
    else:
        places = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"}
        accelerate.dispatch_model(net, places, offload_dir=str(folder))


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_a_merged_network_is_offloaded(where: str, tmp_path: Path) -> None:
    net = tuned()
    expected = output(net)
    merged = gift.merge(net)
    offload(merged, where, tmp_path)
    assert any(parameter.is_meta for parameter in merged.parameters())
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["cpu", "disk", "dispatch"])
def test_an_offloaded_network_is_not_fine_tuned(where: str, tmp_path: Path) -> None:
    net = made()
    expected = output(net)
    offload(net, where, tmp_path)
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert torch.equal(output(net), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_send_nothing_elsewhere(when: str) -> None:
    net = made()
    if when == "before":
        accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    client = Client(net, lambda: output(net))
    client.enable(LoRAAllFineTuningStrategy(rank=1))
    if when == "after":
        accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = nn.functional.mse_loss(net.train()(X)[:, :2], Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    client.check(losses, None)
    remove_hook_from_submodules(net)
    assert torch.equal(output(net), client.base_output)
