"""open_clip: its own loop of training, and its checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gift
from gift import GiftWarning
from gift.strategies import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy
from tests.clients._properties import Client
from tests.common import all_bits, enabled, trainable

open_clip = pytest.importorskip("open_clip")
training = pytest.importorskip("open_clip_train.train")

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gift-vit": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8,
        },
        "text_cfg": TEXT,
    },
    "gift-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "gift-timm": {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "resnet10t", "timm_model_pretrained": False,
            "timm_pool": "avg", "timm_proj": "linear", "image_size": 32,
        },
        "text_cfg": TEXT,
    },
    "gift-coca": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8,
            "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _configs(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def model(name: str) -> Any:
    torch.manual_seed(0)
    net = open_clip.create_model(name, output_dict=True, pretrained_text=False)
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if path.endswith("bn3.weight"):  # zero at first, which hides what is before it
                parameter.fill_(1)
            if path == "text_decoder.text_projection":  # nobody's values
                parameter.normal_(std=0.2)
    return net


def batch(name: str) -> tuple[Tensor, Tensor]:
    size = CONFIGS[name]["vision_cfg"]["image_size"]
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 31, (8, 8), generator=generator)
    texts[:, -1] = 31
    return torch.randn(8, 3, size, size, generator=generator), texts


def features(net: Any, name: str) -> Tensor:
    images, texts = batch(name)
    net.eval()
    with torch.no_grad():
        return net.encode_image(images, normalize=True) @ net.encode_text(texts, normalize=True).T


def train(net: Any, name: str, epochs: int) -> list[float]:
    """By its own function for one epoch, of which the loss is noted."""
    losses: list[float] = []
    coca = name == "gift-coca"
    loss = open_clip.CoCaLoss(2.0, 1.0) if coca else open_clip.ClipLoss()
    settings = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True,
        horovod=False, grad_clip_norm=1.0, rank=0, local_rank=0, log_local=False, world_size=1,
        log_every_n_steps=100, batch_size=8, wandb=False,
    )  # fmt: skip

    class Loader(list[Any]):
        num_batches, num_samples = 1, 8

    def noted(**given: Any) -> Any:
        found = loss(**given)
        losses.append(sum(found.values()).item())
        return found

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    data = {"train": SimpleNamespace(dataloader=Loader([batch(name)]), set_epoch=lambda _: None)}
    for epoch in range(epochs):
        training.train_one_epoch(net, data, noted, epoch, optimizer, None, None, None, settings)
    return losses


STRATEGIES: dict[str, Callable[..., Any]] = {
    "gift-vit": LoRAAllFineTuningStrategy,
    "gift-resnet": LoRAAllFineTuningStrategy,
    "gift-timm": LoRALinearFineTuningStrategy,
    "gift-coca": LoRALinearFineTuningStrategy,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_saving(name: str, tmp_path: Path) -> None:
    net = model(name)
    client = Client(net, lambda: features(net, name))
    client.enable(STRATEGIES[name](rank=1))
    losses = train(net, name, 9)

    def reload() -> Tensor:
        """A checkpoint of its loop, which holds the deltas, and one of the whole model."""
        torch.save({"epoch": 1, "state_dict": net.state_dict()}, tmp_path / "epoch_1.pt")
        fresh = model(name)
        enabled(fresh, STRATEGIES[name](rank=1))
        saved = torch.load(tmp_path / "epoch_1.pt")
        fresh.load_state_dict(saved["state_dict"])
        expected = features(net, name)
        assert torch.equal(features(fresh, name), expected)
        with gift.merged(net):
            torch.save({"state_dict": net.state_dict()}, tmp_path / "whole.pt")
        whole = open_clip.create_model(name, str(tmp_path / "whole.pt"))
        return features(whole, name)

    client.check(losses, reload)


def test_its_locking_of_towers() -> None:
    """`lock_image_tower` freezes the deltas there; the base is as frozen as it was."""
    net = model("gift-vit")
    enabled(net, LoRAAllFineTuningStrategy(rank=1))
    deltas, base = trainable(net), all_bits(net)
    net.lock_image_tower()
    assert trainable(net) == [name for name in deltas if not name.startswith("visual.")]
    train(net, "gift-vit", 2)
    moved = {name for name, value in all_bits(net).items() if base[name] != value}
    assert moved == set(trainable(net))


def test_its_unlocking_of_groups_is_reported() -> None:
    """`unlocked_groups` sets the flags of the last groups, whose base is trained then as well."""
    net = model("gift-vit")
    enabled(net, LoRAAllFineTuningStrategy(rank=1))
    net.lock_image_tower(unlocked_groups=1)
    with pytest.warns(GiftWarning, match="frozen by fine-tuning"):
        train(net, "gift-vit", 1)
