"""The report of a run shows examples, the worst mistakes, and what it was made with."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import gift
from gift.data import Examples, PictureReader, class_folders, labelled
from gift.strategies import FineTuningStrategy
from gift.training import finetune

QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False}


def trained(net: nn.Module, data: Any, folder: Path, **settings: Any) -> Any:
    options = {"epochs": 1, "batch_size": 7, "lr": 1e-6} | QUIET | settings
    return finetune(net, data, data, folder=folder, **options)


def page(folder: Path) -> str:
    return unescape((folder / "report.html").read_text(encoding="utf-8"))


def images(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    for name in ("ant", "bee", "wasp"):
        (folder / name).mkdir(parents=True)
        for number in range(9):
            pixels = torch.randint(0, 255, (8, 8, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder


def test_the_worst_mistakes_are_those_with_the_largest_losses(tmp_path: Path) -> None:
    """By torch's own cross-entropy of each image; they are shown with true and predicted class."""
    data = class_folders(images(tmp_path / "data"), PictureReader(size=8))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    result = trained(net, data, tmp_path / "run")
    inputs = torch.stack([data[place][0] for place in range(len(data))])
    labels = torch.tensor([data[place][1] for place in range(len(data))])
    with torch.no_grad():
        logits = net(inputs)
    losses = F.cross_entropy(logits, labels, reduction="none")
    wrong = [n for n in losses.argsort(descending=True).tolist() if logits[n].argmax() != labels[n]]
    assert data.classes is not None
    expected = [
        (f"{data.classes[labels[n]]}/{n % 9}.png", data.classes[labels[n]],
         data.classes[logits[n].argmax()]) for n in wrong[:12]
    ]  # fmt: skip
    assert [(one.input, one.true, one.predicted) for one in result.mistakes] == expected
    assert [one.loss for one in result.mistakes] == pytest.approx(
        losses[wrong[:12]].tolist(), rel=1e-4
    )
    assert len(result.shown) == 12
    assert all(one.png.startswith(b"\x89PNG") for one in [*result.mistakes, *result.shown])
    text = page(tmp_path / "run")
    assert text.index("Worst mistakes") < text.index(expected[0][0])
    assert text.count("data:image/png;base64") >= 24


@pytest.mark.parametrize("task", ["texts", "numbers", "several classes"])
def test_other_tasks_show_texts_and_numbers(task: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=draw)
    net = nn.Linear(4, 3)
    if task == "numbers":
        data: Any = Examples(
            torch.utils.data.TensorDataset(inputs, inputs[:, :3] * 2), "regression"
        )
    elif task == "several classes":
        labels = (inputs[:, :3] > 0).float()
        data = Examples(
            torch.utils.data.TensorDataset(inputs, labels), "multi_label", classes=("a", "b", "c")
        )
    else:

        class Words:
            kind, stands_alone = "text", True

            def __call__(self, raw: str) -> Tensor:
                return inputs[int(raw.split()[-1])]

            augmented = __call__

            def collate(self, items: Any) -> Tensor:
                return torch.stack(list(items))

            def to_config(self, folder: Any = None) -> dict[str, Any]:
                return {}

        texts = [f"<b>the text</b> number {n}" for n in range(30)]
        data = labelled(texts, [n % 3 for n in range(30)], Words())  # type: ignore[arg-type]
    result = trained(net, data, tmp_path / "run")
    assert result.mistakes
    ordered = [one.loss for one in result.mistakes]
    assert ordered == sorted(ordered, reverse=True)
    first = result.mistakes[0]
    assert first.true != first.predicted
    if task == "texts":
        assert re.fullmatch(r"<b>the text</b> number \d+", first.input)
        assert "<b>the text" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    elif task == "numbers":
        errors = (net(inputs) - inputs[:, :3] * 2).square().mean(1)
        worst = int(errors.argmax())
        assert first.input == f"example {worst}"
        assert [float(part) for part in first.true.split(", ")] == pytest.approx(
            (inputs[worst, :3] * 2).tolist(), rel=1e-3
        )
    else:
        assert {*first.true.split(", ")} <= {"a", "b", "c", "none"}


def test_the_report_says_what_it_was_made_with(tmp_path: Path) -> None:
    data = class_folders(images(tmp_path / "data"), PictureReader(size=8))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    finetune(
        net, data, data, folder=tmp_path / "run", epochs=2, lr=0.125, **QUIET,
        about={"Training examples": "somewhere"},
    )  # fmt: skip
    text = page(tmp_path / "run")
    for expected in (torch.__version__, gift.__version__, "0.125", "somewhere", "Device", "cpu"):
        assert expected in text
    assert re.search(r"Date</th><td class=\"words\">\d{4}-\d\d-\d\d", text)
    assert re.search(r"To learn from</th><td class=\"words\">27<", text)


def test_what_a_run_wrote_is_read_again(tmp_path: Path) -> None:
    from gift.training.result import read_result

    data = class_folders(images(tmp_path / "data"), PictureReader(size=8))
    result = trained(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), data, tmp_path / "run")
    again = read_result(tmp_path / "run")
    for name in ("history", "after", "before", "confusion", "classes", "about", "trained"):
        assert getattr(again, name) == getattr(result, name)


def test_without_a_folder_nothing_is_collected() -> None:
    inputs = torch.randn(8, 4)
    result = finetune(
        nn.Linear(4, 2), (inputs, torch.arange(8) % 2), (inputs, torch.arange(8) % 2), epochs=1,
        strategy=FineTuningStrategy(para_caps=[(lambda *_: True, lambda *_: None)]), **QUIET,
    )  # fmt: skip
    assert (result.mistakes, result.shown) == ([], [])
