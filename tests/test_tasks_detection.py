"""Objects in images: which are shown and drawn, and the average precision of each class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gift.core.io_spec import set_io_spec
from gift.data import Examples
from gift.data.boxes import collate_boxed
from gift.data.readers import DetectorReader
from gift.strategies import FullFineTuningStrategy
from gift.training import TrainingError, evaluate, finetune, predict
from gift.training.drawings import write_drawings
from gift.training.predictions import Prediction
from tests.small_files import saved

NAMES = ("__background__", "cat", "dog")
TRUE = [([[2, 2, 12, 12], [20, 4, 30, 14]], [1, 2]), ([[5, 5, 15, 15]], [1])]
SAID = [
    ([[2, 2, 12, 12], [21.2, 4, 30, 14], [0, 20, 8, 28]], [1, 2, 1], [0.9, 0.8, 0.7]),
    ([[5, 5, 15, 15], [1, 1, 4, 4]], [1, 2], [0.3, 0.6]),
]


class Detector(nn.Module):
    """Finds what it was made with, the first image by its darker corner."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        if self.training:
            return {"loss": self.scale**2, "other": self.scale * 2}
        return [self._found(int(image[0, 0, 0] > 0.5)) for image in images]

    def _found(self, number: int) -> dict[str, Tensor]:
        boxes, labels, scores = SAID[number]
        return {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels),
                "scores": torch.tensor(scores)}  # fmt: skip


def examples() -> Examples:
    items = []
    for number, (boxes, labels) in enumerate(TRUE):
        image = torch.full((3, 30, 40), 0.2 + 0.6 * number)
        items.append(
            (image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
        )
    return Examples(items, "detection", NAMES, collate_boxed, DetectorReader())  # type: ignore[arg-type]


def average_precision(number: int, least: float) -> float:
    """COCO's: precision, made falling, at 101 recalls; matched greedily by score."""
    guesses = sorted(
        ((score, image, box) for image, (boxes, labels, scores) in enumerate(SAID)
         for box, label, score in zip(boxes, labels, scores, strict=True) if label == number),
        reverse=True,
    )  # fmt: skip
    objects = {
        (image, n): box
        for image, (boxes, labels) in enumerate(TRUE)
        for n, (box, label) in enumerate(zip(boxes, labels, strict=True))
        if label == number
    }
    free, hits = dict(objects), []
    for _, image, box in guesses:
        best = max((key for key in free if key[0] == image),
                   key=lambda key: overlap(free[key], box), default=None)  # fmt: skip
        hits.append(best is not None and overlap(free[best], box) >= least)
        if hits[-1]:
            del free[best]  # type: ignore[arg-type]
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    recall = right / len(objects)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    found = [falling[recall >= at][0] if (recall >= at - 1e-9).any() and
             (recall >= at).any() else 0.0 for at in np.linspace(0, 1, 101)]  # fmt: skip
    return float(np.mean(found))


def overlap(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def test_average_precision_of_each_class_beside_its_formula() -> None:
    found = evaluate(Detector(), examples(), device="cpu")
    levels = np.arange(0.5, 0.96, 0.05)
    for number, name in ((1, "cat"), (2, "dog")):
        expected = np.mean([average_precision(number, level) for level in levels])
        assert found[f"map of {name}"] == pytest.approx(expected, abs=1e-4)
    mean = (found["map of cat"] + found["map of dog"]) / 2
    assert found["map"] == pytest.approx(mean, abs=1e-6)
    assert "map of __background__" not in found


def test_a_training_gives_each_class_and_draws_boxes(tmp_path: Path) -> None:
    net, data = Detector(), examples()
    result = finetune(net, data, data, strategy=FullFineTuningStrategy(), epochs=1, batch_size=2,
                      device="cpu", progress=False, folder=tmp_path)  # fmt: skip
    assert set(result.after) == {"map", "map_50", "map of cat", "map of dog"}
    assert [one.caption for one in result.samples] == [
        "2 true boxes, 3 predicted with a score of 0.5 or more",
        "1 true boxes, 1 predicted with a score of 0.5 or more",
    ]
    page = (tmp_path / "report.html").read_text()
    assert "map of dog" in page
    assert page.count("true boxes,") == 4  # captions, and for who cannot see


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, ["cat", "dog", "cat"]),
        ({"threshold": 0.75}, ["cat", "dog"]),
        ({"top": 1}, ["cat"]),
        ({"top": 9, "threshold": 0.95}, []),
    ],
)
def test_thresholds_and_the_best_ones(options: dict[str, Any], labels: list[str]) -> None:
    net = Detector()
    set_io_spec(net, DetectorReader(), NAMES, "detection")
    [found] = predict(net, [torch.zeros(3, 30, 40)], **options)
    assert found.labels == labels
    assert found.scores == sorted(found.scores, reverse=True)
    [other] = predict(net, [torch.ones(3, 30, 40)])
    assert other.labels == ["dog", "cat"]  # by score


def test_drawings_are_written_beside_each_other(tmp_path: Path) -> None:
    net = Detector()
    set_io_spec(net, DetectorReader(), NAMES, "detection")
    paths = [saved(tmp_path / f"{n}.png", width=40, height=30, seed=n) for n in range(2)]
    found = predict(net, paths, top=2)
    files = write_drawings(found, tmp_path / "out")
    assert [file.name for file in files] == ["0000_0.png", "0001_1.png"]
    plain, drawn = (np.asarray(Image.open(file).convert("RGB")) for file in (paths[0], files[0]))
    changed = (plain != drawn).any(2)
    left, top, _, bottom = (int(side) for side in found[0].boxes[0])
    assert changed[top + 1 : bottom, left].mean() > 0.9
    assert not changed[25:, 35:].any()
    empty = predict(net, paths[0], threshold=1.0)
    write_drawings(empty, tmp_path / "empty")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "empty/0000_0.png")), plain)
    with pytest.raises(TrainingError, match="Prediction is nothing to draw"):
        write_drawings([Prediction("a", 0, 1.0, {0: 1.0})], tmp_path)
