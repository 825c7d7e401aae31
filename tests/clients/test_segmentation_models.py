"""segmentation-models-pytorch: its networks and losses, and the folders that it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gift
from gift import GiftWarning
from gift.strategies import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy
from tests.clients._properties import Client

smp = pytest.importorskip("segmentation_models_pytorch")

PLACES = torch.linspace(-1, 1, 64)
MASKS = ((PLACES[:, None] ** 2 + PLACES**2) < torch.tensor([0.2, 0.5])[:, None, None]).float()
X = MASKS[:, None].expand(2, 3, 64, 64) * 0.5 + torch.sin(20 * PLACES)


def network(architecture: str, encoder: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return smp.create_model(architecture, encoder, encoder_weights=None, classes=1, **settings)


def masks(net: Any) -> Tensor:
    with torch.no_grad():
        return net.eval()(X)


def train(net: Any, steps: int = 9) -> list[float]:
    loss_of, losses = smp.losses.DiceLoss(mode="binary"), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = loss_of(net.train()(X), MASKS[:, None])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


PYRAMID = {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
SMALL = {"decoder_channels": (32, 32, 16, 16, 16)}
NETWORKS: dict[str, tuple[str, str, dict[str, Any], Callable[..., Any]]] = {
    "unet": ("unet", "resnet18", SMALL, LoRAConvFineTuningStrategy),
    "fpn": ("fpn", "resnet18", PYRAMID, LoRAAllFineTuningStrategy),
    "timm": ("unet", "tu-mobilenetv3_small_050", SMALL, LoRAAllFineTuningStrategy),
    "segformer": ("segformer", "mit_b0", {"decoder_segmentation_channels": 16},
                  LoRAAllFineTuningStrategy),
    "deeplab": ("deeplabv3plus", "resnet18", {"decoder_channels": 16}, LoRAAllFineTuningStrategy),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_training_and_saving(name: str, tmp_path: Path) -> None:
    architecture, encoder, settings, strategy = NETWORKS[name]
    net = network(architecture, encoder, **settings)
    client = Client(net, lambda: masks(net), atol=1e-4)
    client.enable(strategy(rank=1))
    losses = train(net)

    def reload() -> Tensor:
        net.save_pretrained(tmp_path)
        return masks(smp.from_pretrained(tmp_path))

    client.check(losses, reload)


def test_its_way_of_loading_takes_deltas() -> None:
    """Its ``load_state_dict`` has arguments of its own, and renames old encoders."""
    net, fresh = network("unet", "resnet18", **SMALL), network("unet", "resnet18", **SMALL)
    for one in (net, fresh):
        gift.enable_fine_tuning(one, LoRAConvFineTuningStrategy(rank=1))
    train(net, 2)
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(masks(fresh), masks(net))
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        fresh.load_state_dict({**net.state_dict(), "other": torch.zeros(1)})


def test_its_way_of_unfreezing_is_reported() -> None:
    """`unfreeze_encoder` sets the flag of each parameter of the encoder."""
    net = network("unet", "resnet18", **SMALL)
    gift.enable_fine_tuning(net, LoRAConvFineTuningStrategy(rank=1))
    deltas = [name for name, p in net.named_parameters() if p.requires_grad]
    net.freeze_encoder()
    now = [name for name, p in net.named_parameters() if p.requires_grad]
    assert now == [name for name in deltas if not name.startswith("encoder.")]
    net.unfreeze_encoder()
    with pytest.warns(GiftWarning, match="frozen by fine-tuning.*encoder.conv1.weight"):
        train(net, 1)
    net.encoder.requires_grad_(False).requires_grad_(True)  # has the right effect
    assert [name for name, p in net.named_parameters() if p.requires_grad] == deltas
