"""pytorch-metric-learning: its losses, miners and trainer over embeddings of images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift import enable_fine_tuning
from gift.strategies import LoRAAllFineTuningStrategy
from tests.clients._properties import Client

metric_learning = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import losses, miners, trainers  # noqa: E402

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def trunk() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())


def embedder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(16 * 36, 16)


def output(*parts: nn.Module) -> Tensor:
    found = X
    with torch.no_grad():
        for part in parts:
            found = part.eval()(found)
    return found


def test_its_trainer(tmp_path: Path) -> None:
    """Which trains trunk and embedder by optimizers of their own."""
    net = nn.ModuleDict({"trunk": trunk(), "embedder": embedder()})
    strategy = LoRAAllFineTuningStrategy(rank=2)
    client = Client(net, lambda: output(*net.values()))
    client.enable(strategy)
    parts = {name: list(part.parameters()) for name, part in net.items()}
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam([p for p in part if p.requires_grad], lr=3e-3)
        for name, part in parts.items()
    }
    noted: list[float] = []

    def note(trainer: Any) -> None:
        noted.append(float(trainer.losses["total_loss"]))

    trainers.MetricLossOnly(
        models=dict(net.items()),
        optimizers=optimizers,
        batch_size=16,
        loss_funcs={"metric_loss": losses.TripletMarginLoss(margin=0.5)},
        dataset=list(zip(X, Y.tolist(), strict=True)),
        mining_funcs={"tuple_miner": miners.BatchHardMiner()},
        dataloader_num_workers=0,
        data_device="cpu",
        end_of_iteration_hook=note,
    ).train(num_epochs=6)

    def reload() -> Tensor:
        torch.save(net.state_dict(), tmp_path / "deltas.pt")
        fresh = nn.ModuleDict({"trunk": trunk(), "embedder": embedder()})
        enable_fine_tuning(fresh, strategy)
        fresh.load_state_dict(torch.load(tmp_path / "deltas.pt"))
        return output(*fresh.values())

    client.check(noted, reload, exact=True)
