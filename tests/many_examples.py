"""A job whose runs take a tenth of a second, and searches of it."""

import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from tests.job_examples import CHEAP, images


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU())
        self.fc = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def tiny_job(folder: Path, **training: Any) -> dict[str, Any]:
    """A job for `Net`, with its images in the folder."""
    if not (folder / "data").exists():
        images(folder / "data")
    places = {"train": "data/train", "valid": "data/val"}
    paras = {"rank": 1, "clip_rank": True}
    return {
        "data": {"kind": "class_folders", "reader": {"size": 4}, **places},
        "strategy": {"name": "LoRAAllFineTuningStrategy", "init_paras": paras},
        "training": CHEAP | {"epochs": 3, "lr": 0.01} | training,
    }


def tiny_search(folder: Path, **parts: Any) -> Path:
    """A search for the rate and the rank, as a file in the folder."""
    vary = {"lr": {"low": 1e-4, "high": 0.5, "log": True}, "rank": {"low": 1, "high": 4}}
    content = {"job": tiny_job(folder), "vary": vary, "budget": {"trials": 4}}
    content |= {"pruner": "none"} | parts
    (folder / "search.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "search.yaml"


class Slow(Net):
    """Takes a tenth of a second for each batch, so that there is time to interrupt it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return super().forward(x)
