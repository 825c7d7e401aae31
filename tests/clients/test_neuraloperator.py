"""neuraloperator: Fourier neural operators, their own checkpoints, and their trainer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gift
from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.factories import pa_adapt, pc_ndim, pc_path
from gift.strategies import LoRAAllFineTuningStrategy, merge_strategies
from tests.clients._properties import Client

neuralop = pytest.importorskip("neuralop")

SPECTRAL = "*.convs.*.weight.*"  # `tensor`, or the core and factors of its decomposition
GRID = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 16)] * 2, indexing="ij"))
X = torch.stack([(GRID[0] * (i + 1) + GRID[1] * (8 - i)).sin() for i in range(8)])[:, None]
Y = X.cumsum(-1) / 8


def operator(factorization: str | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    return neuralop.models.FNO(
        n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2,
        factorization=factorization, rank=0.5, **settings,
    )  # fmt: skip


def all_of_it() -> FineTuningStrategy:
    """Layers, and the complex weights of the spectral convolutions."""
    return merge_strategies(
        [
            LoRAAllFineTuningStrategy(rank=2, clip_rank=True),
            FineTuningStrategy(
                para_caps=[
                    (pc_path(glob=SPECTRAL) & pc_ndim(2), pa_adapt("lora", rank=2)),
                ]
            ),
        ]
    )


def output(net: Any) -> Tensor:
    with torch.no_grad():
        return net.eval()(X)


class Noting(nn.Module):
    """A loss of neuraloperator that notes its values."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.values = neuralop.LpLoss(d=2, p=2), []

    def forward(self, out: Tensor, y: Tensor, **_: Any) -> Tensor:
        value = self.loss(out, y)
        if torch.is_grad_enabled():
            self.values.append(value.item())
        return value


def train(net: Any, folder: Path, epochs: int = 6, **settings: Any) -> list[float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    trainer = neuralop.Trainer(model=net, n_epochs=epochs, device="cpu", verbose=False)
    data = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
    loss = Noting()
    trainer.train(
        DataLoader(data, batch_size=4), {"test": DataLoader(data, batch_size=4)}, optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 100), training_loss=loss,
        eval_losses={"l2": loss}, save_dir=folder, **settings,
    )  # fmt: skip
    return loss.values


def loaded(folder: Path, name: str, factorization: str | None) -> Any:
    fresh = operator(factorization)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)  # ranks are clipped, as `Client` knows
        enable_fine_tuning(fresh, all_of_it())
    fresh.load_checkpoint(folder, name)
    return fresh


@pytest.mark.parametrize("factorization", [None, "tucker", "cp", "tt"])
def test_training_and_saving(factorization: str | None, tmp_path: Path) -> None:
    """`save_checkpoint` writes the deltas of a network that is being fine-tuned."""
    net = operator(factorization)
    client = Client(net, lambda: output(net))
    client.enable(all_of_it())
    assert any(p.is_complex() for p in net.parameters())
    losses = train(net, tmp_path)

    def reload() -> Tensor:
        net.save_checkpoint(tmp_path, "now")
        return output(loaded(tmp_path, "now", factorization))

    client.check(losses, reload, exact=True)


@pytest.mark.filterwarnings("ignore:the delta has more parameters")
def test_its_checkpoint_of_a_merged_operator_is_a_whole_one(tmp_path: Path) -> None:
    """`from_checkpoint` makes the network itself, so it needs all weights."""
    net = operator()
    with pytest.warns(GiftWarning, match="70% of the base") as caught:
        enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2, clip_rank=True))
    assert "pc_path(glob=['fno_blocks.convs.*.weight.tensor'])" in str(caught[0].message)
    train(net, tmp_path)
    expected = output(net)
    gift.merge(net).save_checkpoint(tmp_path, "whole")
    found = output(neuralop.models.FNO.from_checkpoint(tmp_path, "whole"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
