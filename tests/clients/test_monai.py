"""MONAI: its networks, in the loop of its tutorials and in its trainer.

Its volumes are tensors of a class of its own, which every function of torch gives back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gift
from gift.strategies import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy
from tests.clients._properties import Client
from tests.common import enabled, trainable

monai = pytest.importorskip("monai")
nets = pytest.importorskip("monai.networks.nets")
from monai.data import CacheDataset, DataLoader, MetaTensor  # noqa: E402
from monai.inferers import sliding_window_inference  # noqa: E402
from monai.losses import DiceCELoss  # noqa: E402
from monai.networks.utils import copy_model_state  # noqa: E402

SIZE = 32
PLACES = torch.linspace(-1, 1, SIZE)
DISTANCE = PLACES[:, None, None] ** 2 + PLACES[:, None] ** 2 + PLACES**2
LABELS = torch.stack([size > DISTANCE for size in (0.2, 0.5)])[:, None]
VOLUMES = LABELS * 0.6 + torch.sin(9 * PLACES)


def data(batch_size: int = 2) -> Any:
    """Batches of volumes, as a chain of its transforms gives them."""
    rows = [
        {"image": MetaTensor(volume, affine=torch.eye(4)), "label": label.long()}
        for volume, label in zip(VOLUMES, LABELS, strict=True)
    ]
    scaled = monai.transforms.Compose([monai.transforms.ScaleIntensityd("image")])
    return DataLoader(CacheDataset(rows, scaled, progress=False), batch_size=batch_size)


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "unet": (
        lambda: nets.UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1),
        LoRAAllFineTuningStrategy,
    ),
    "dynunet": (
        lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16]),
        LoRAAllFineTuningStrategy,
    ),
    "swin": (
        lambda: nets.SwinUNETR(
            1, 2, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), feature_size=12, window_size=2,
            norm_name="batch",
        ),
        LoRALinearFineTuningStrategy,
    ),
    "unetr": (
        lambda: nets.UNETR(
            1, 2, img_size=SIZE, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2,
        ),
        LoRALinearFineTuningStrategy,
    ),
    "segresnet": (
        lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)),
        LoRAAllFineTuningStrategy,
    ),
}  # fmt: skip


def made(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name][0]()


def segmented(net: Any) -> Tensor:
    """By windows, as whole volumes are."""
    volumes = MetaTensor(VOLUMES)
    with torch.no_grad():
        found = sliding_window_inference(volumes, (SIZE,) * 3, 2, net.eval(), overlap=0.0)
    assert type(found) is MetaTensor
    return found.as_tensor()


@pytest.mark.parametrize("name", NETWORKS)
def test_training_and_saving(name: str, tmp_path: Path) -> None:
    net = made(name)
    client = Client(net, lambda: segmented(net), atol=1e-4)
    client.enable(NETWORKS[name][1](rank=1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    loss_of, losses = DiceCELoss(to_onehot_y=True, softmax=True), []
    for _ in range(6):
        for batch in data():
            loss = loss_of(net.train()(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))

    def reload() -> Tensor:
        torch.save(net.state_dict(), tmp_path / "best.pth")
        fresh = enabled(made(name), NETWORKS[name][1](rank=1))
        fresh.load_state_dict(torch.load(tmp_path / "best.pth"))
        return segmented(fresh)

    client.check(losses, reload, exact=True)


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_its_trainer(name: str, tmp_path: Path) -> None:
    """With its checkpoints, of which one is loaded by its handler into a fresh base."""
    pytest.importorskip("ignite", reason="MONAI's trainers need pytorch-ignite")
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointLoader, CheckpointSaver, StatsHandler

    losses: list[float] = []

    def trainer(net: Any, epochs: int, *handlers: Any) -> Any:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
        return SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=epochs, train_data_loader=data(), network=net,
            optimizer=optimizer, loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
            train_handlers=[StatsHandler(output_transform=lambda found: found[0]["loss"]),
                            *handlers],
        )  # fmt: skip

    net, strategy = made(name), NETWORKS[name][1](rank=1)
    client = Client(net, lambda: segmented(net), atol=1e-4)
    client.enable(strategy)
    saver = CheckpointSaver(str(tmp_path), {"net": net}, save_final=True, final_filename="last.pt")
    engine = trainer(net, 6, saver)
    engine.add_event_handler(
        monai.engines.utils.IterationEvents.LOSS_COMPLETED,
        lambda engine: losses.append(float(engine.state.output["loss"])),
    )
    engine.run()

    def reload() -> Tensor:
        fresh = enabled(made(name), strategy)
        loader = CheckpointLoader(str(tmp_path / "last.pt"), {"net": fresh})
        loader(trainer(fresh, 1))
        return segmented(fresh)

    client.check(losses, reload, exact=True)


def test_a_copied_state() -> None:
    """`copy_model_state` moves deltas between networks, and none of the base."""
    net, fresh = (enabled(made("unet"), LoRAAllFineTuningStrategy(rank=1)) for _ in range(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    _, changed, unchanged = copy_model_state(fresh, net)
    assert set(trainable(net)) <= set(changed)
    assert not unchanged
    assert torch.equal(segmented(fresh), segmented(net))
    with gift.merged(net):
        whole = made("unet")
        copy_model_state(whole, net)
    torch.testing.assert_close(segmented(whole), segmented(net), rtol=1e-4, atol=1e-4)
