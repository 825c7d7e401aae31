"""ultralytics: its trainer on boxes that were drawn, its checkpoints, and its fusing."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gift
from gift import GiftWarning
from gift.strategies import LoRAConvFineTuningStrategy
from tests.clients._properties import Client
from tests.common import enabled, full_state

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # not the user's own settings
os.environ.setdefault("YOLO_OFFLINE", "true")
ultralytics = pytest.importorskip("ultralytics")
pil = pytest.importorskip("PIL.Image")
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402

MODEL = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, SPPF, [32, 5]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 1, RepConv, [48, 48, 3]]
  - [[7, 4], 1, Detect, [nc]]
"""
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model, and images of a bright and a dark square."""
    (tmp_path / "tiny.yaml").write_text(MODEL)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(8):
        shown = pil.new("RGB", (64, 64), (90, 120, 90))
        place = 4 + 3 * number
        shown.paste(pil.new("RGB", (24, 24), (250, 240, 230)), (place, 8))
        shown.paste(pil.new("RGB", (16, 16), (5, 10, 40)), (10, 40))
        shown.save(tmp_path / "images" / f"{number}.png")
        boxes = [(0, place + 12, 20, 24), (1, 18, 48, 16)]
        lines = [f"{kind} {x / 64} {y / 64} {size / 64} {size / 64}" for kind, x, y, size in boxes]
        (tmp_path / "labels" / f"{number}.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: bright, 1: dark}}\n"
    )
    return tmp_path


def scores(net: Any) -> Tensor:
    """Boxes in pixels, and scores."""
    with torch.no_grad():
        return net.eval()(X)[0]


def train(yolo: Any, trainer: type, folder: Path, **settings: Any) -> None:
    settings = {"epochs": 3, "lr0": 2e-2, "optimizer": "AdamW", "warmup_epochs": 0} | settings
    yolo.train(
        trainer=trainer, data=str(folder / "data.yaml"), project=str(folder / "runs"), imgsz=64,
        batch=4, nbs=4, workers=0, device="cpu", amp=False, plots=False, mosaic=0.0, fliplr=0.0,
        scale=0.0, translate=0.0, hsv_v=0.0, verbose=False, seed=0, **settings,
    )  # fmt: skip


class Merging(DetectionTrainer):
    """Half of the recipe: its checkpoints are of plain networks, with merged weights."""

    def save_model(self) -> Any:
        with gift.merged(self.ema.ema):
            return super().save_model()


class Tuning(Merging):
    """The other half: the network is fine-tuned when its optimizer is made."""

    def build_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.net, self.losses = model, []
        self.client = Client(model, lambda: scores(self.net), atol=1e-3)
        self.client.enable(LoRAConvFineTuningStrategy(rank=1))
        return super().build_optimizer(model, *args, **kwargs)

    def optimizer_step(self) -> None:
        self.losses.append(self.loss.item())
        super().optimizer_step()


def test_training_and_saving(files: Path) -> None:
    yolo = ultralytics.YOLO(files / "tiny.yaml", task="detect")
    train(yolo, Tuning, files)
    trainer = yolo.trainer
    client = trainer.client
    client.net = trainer.net = trainer.ema.ema.requires_grad_(True)  # the average is what it saves

    def reload() -> Tensor:
        loaded = ultralytics.YOLO(trainer.last)
        found = scores(loaded.model.float())
        assert type(loaded.model) is DetectionModel
        shown = loaded.predict(files / "images" / "0.png", imgsz=64, verbose=False, conf=0.0)
        assert len(shown[0].boxes)
        return found

    # The loss has a way of its own from distributions to boxes, and finds none on the coarse grid.
    still = ["*.dfl.*", "*.cv2.1.*lora_B"]
    client.check(trainer.losses, reload, saved_as=torch.float16, still=still)


def tuned(files: Path) -> Any:
    torch.manual_seed(0)
    net = DetectionModel(str(files / "tiny.yaml"), verbose=False).eval()
    return enabled(net, LoRAConvFineTuningStrategy(rank=1), std=0.05)


def test_fusing_asks_for_merged_weights(files: Path) -> None:
    """As do `predict`, `val` and `export`, which fuse."""
    net = tuned(files)
    expected, before = scores(net), full_state(net)
    with pytest.raises(RuntimeError, match=r"Conv2d.weight is adapted.*gift.merge\(network\)"):
        net.fuse(verbose=False)
    assert full_state(net) == before
    with pytest.raises(RuntimeError, match=r"Conv2d is about to join a RepConv as 'conv'"):
        net.model[7].fuse_convs()
    assert full_state(net) == before
    with gift.merged(net):
        torch.testing.assert_close(scores(net.fuse(verbose=False)), expected, rtol=1e-4, atol=1e-3)
        assert net.is_fused()
    assert full_state(net) == before
    gift.merge(net).fuse(verbose=False)
    torch.testing.assert_close(scores(net), expected, rtol=1e-4, atol=1e-3)


def test_a_network_that_is_fine_tuned_too_early_is_reported(files: Path) -> None:
    """The trainer sets the flag of each parameter before it makes its optimizer."""

    class Early(Merging):
        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            return enabled(super().get_model(*args, **kwargs), LoRAConvFineTuningStrategy(rank=1))

    with pytest.warns(GiftWarning, match="frozen by fine-tuning"):
        train(ultralytics.YOLO(files / "tiny.yaml"), Early, files, epochs=1, val=False)
