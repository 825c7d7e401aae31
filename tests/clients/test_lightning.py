"""Lightning: fitting, checkpoints, and the callbacks that average, freeze and unfreeze.

What a checkpoint holds, and that a run goes on from it as if it had not stopped, is in
`tests/test_trainers.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gift import GiftWarning, enable_fine_tuning
from gift.strategies import (
    DoRAAllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)
from tests.clients._properties import Client
from tests.common import all_bits

lightning = pytest.importorskip("lightning")
callbacks = lightning.pytorch.callbacks

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
    """A backbone and a head, as examples of Lightning have them."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16)
        )
        self.head = nn.Linear(16, 4)
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).relu())

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.hparams.lr)


def output(module: Classifier) -> Tensor:
    with torch.no_grad():
        found = module.eval()(X)
    module.train()
    return found


def batches(size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=size)


def trainer_in(folder: Path, epochs: int, *used: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(used),
    )  # fmt: skip


def part_of(module: Classifier, which: str) -> nn.Module:
    return module if which == "whole" else module.backbone


@pytest.mark.parametrize("which", ["whole", "backbone"])
@pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, DoRAAllFineTuningStrategy])
def test_the_best_checkpoint(which: str, strategy: Any, tmp_path: Path) -> None:
    module = Classifier()
    if which == "backbone":  # its head is trained beside it, and is not fine-tuned
        module.head.requires_grad_(False)
    client = Client(part_of(module, which), lambda: output(module))
    client.enable(strategy(rank=2))
    best = callbacks.ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=1)
    trainer = trainer_in(tmp_path, 6, best)
    trainer.fit(module, batches(), batches())

    def reload() -> Tensor:
        trainer.save_checkpoint(tmp_path / "now.ckpt")
        fresh = Classifier()
        enable_fine_tuning(part_of(fresh, which), strategy(rank=2))
        fresh.load_state_dict(torch.load(tmp_path / "now.ckpt", weights_only=True)["state_dict"])
        return output(fresh)

    assert best.best_model_score < 1.4
    client.check(module.losses, reload, exact=True)


def test_loading_a_checkpoint_as_lightning_does(tmp_path: Path) -> None:
    """`load_from_checkpoint` makes the module, so it is there that fine-tuning is enabled."""

    class Tuned(Classifier):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__(lr)
            enable_fine_tuning(self.backbone, LoRAAllFineTuningStrategy(rank=2))

    module = Tuned()
    trainer = trainer_in(tmp_path, 2)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    loaded = Tuned.load_from_checkpoint(tmp_path / "now.ckpt")
    assert torch.equal(output(loaded), output(module))
    predicted = torch.cat(trainer.predict(loaded, DataLoader(X, batch_size=8)))
    torch.testing.assert_close(predicted, output(module))


class Noting(callbacks.Callback):
    """Notes what is trained, as each epoch starts and after each of them."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts.append(trained_in(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append(trained_in(pl_module))


def trained_in(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", ["whole", "backbone"])
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_weights(average: str, which: str, tmp_path: Path) -> None:
    """They are averages of deltas, since what is frozen has one value."""
    module, noted = Classifier(), Noting()
    if which == "backbone":
        module.head.requires_grad_(False)
    client = Client(part_of(module, which), lambda: output(module))
    client.enable(LoRAAllFineTuningStrategy(rank=2))
    if average == "swa":
        averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    else:
        averaging = callbacks.EMAWeightAveraging(decay=0.5, use_buffers=False)
    trainer = trainer_in(tmp_path, 6, averaging, noted)
    trainer.fit(module, batches(16))  # one step in each epoch
    for name, value in trained_in(module).items():
        if average == "swa":  # there is one epoch more, which learns the statistics of that average
            expected = torch.stack([start[name] for start in noted.starts[1:6]]).mean(0)
            found = noted.starts[6][name]
        else:  # the first value is taken as it is
            expected, found = noted.ends[0][name], value
            for end in noted.ends[1:]:
                expected = expected * 0.5 + end[name] * 0.5
        torch.testing.assert_close(found, expected)

    def reload() -> Tensor:
        trainer.save_checkpoint(tmp_path / "now.ckpt")
        fresh = Classifier()
        enable_fine_tuning(part_of(fresh, which), LoRAAllFineTuningStrategy(rank=2))
        fresh.load_state_dict(torch.load(tmp_path / "now.ckpt", weights_only=False)["state_dict"])
        return output(fresh)

    client.check(module.losses, reload, exact=True)


class Unfreezing(callbacks.BaseFinetuning):
    """The backbone's deltas wait for the third epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pl_module.backbone.requires_grad_(False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            pl_module.backbone.requires_grad_(True)
            optimizer.add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 0.03})


def test_a_callback_that_unfreezes_the_deltas_of_a_backbone(tmp_path: Path) -> None:
    module = Classifier()
    module.head.requires_grad_(False)
    start = module.head.weight.detach().clone()
    client = Client(module.backbone, lambda: output(module))
    client.enable(LoRAAllFineTuningStrategy(rank=2))
    module.head.requires_grad_(True)
    trainer = trainer_in(tmp_path, 2, Unfreezing())
    trainer.fit(module, batches())
    assert {n: b for n, b in all_bits(module.backbone).items() if n in client.deltas} == {
        n: b for n, b in client.start.items() if n in client.deltas
    }
    trainer_in(tmp_path, 6, Unfreezing()).fit(module, batches())
    assert not torch.equal(module.head.weight, start)
    with torch.no_grad():
        module.head.load_state_dict(Classifier().head.state_dict())  # of which the client is not
    client.check(module.losses, None)


def test_its_own_way_of_unfreezing_a_backbone_is_reported(tmp_path: Path) -> None:
    """`BackboneFinetuning` sets the flag of each parameter of the backbone, the frozen ones too."""
    module = Classifier()
    enable_fine_tuning(module.backbone, LoRALinearFineTuningStrategy(rank=2))
    base = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    unfreezing = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    with pytest.warns(GiftWarning, match="frozen by fine-tuning") as caught:
        trainer_in(tmp_path, 3, unfreezing).fit(module, batches())
    assert len([one for one in caught if issubclass(one.category, GiftWarning)]) == 1
    now = dict(module.backbone.named_parameters())
    assert not torch.equal(now["0.weight"], base["0.weight"])  # as the warning says
