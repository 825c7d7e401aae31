"""`python -m gift.demo`: its facts are checked again, by other means."""

import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from gift.demo.__main__ import main
from gift.demo.data import digits, read_folder
from gift.demo.network import SmallResNet, predict
from gift.demo.story import Facts, same

COLOURS = {"blue": (20, 40, 200), "green": (20, 200, 40), "red": (200, 30, 30), "white": (230,) * 3}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo chooses its threads by the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, Path]:
    out = tmp_path_factory.mktemp("digits") / "new" / "folder"
    return main(["--steps", "60", "--out", str(out)]), out


def write_images(folder: Path, classes: list[str], number: int) -> Path:
    """Class folders of noisy images, each class with a colour of its own."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(number):
            noise = torch.randint(-20, 20, (18, 24 + index, 3))
            pixels = (torch.tensor(COLOURS[name]) + noise).clamp(0, 255).byte().numpy()
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_promises_hold_on_digits(of_digits: tuple[Facts, Path]) -> None:
    result, _ = of_digits
    assert result.same_output
    assert result.same_base
    assert result.base_accuracy is not None
    assert result.base_accuracy > 0.9


def test_every_way_learns_the_new_digits(of_digits: tuple[Facts, Path]) -> None:
    """Five classes: 0.2 is what guessing gives."""
    lora, everything, head = of_digits[0].ways
    assert lora.after > lora.before + 0.4
    assert everything.after > everything.before + 0.4
    assert head.after > head.before
    assert lora.after > head.after


def test_trained_parameters_are_those_of_the_formula(of_digits: tuple[Facts, Path]) -> None:
    """Rank 2 beside each convolution ``(o, i, kh, kw)``, seen as ``(o*kh, i*kw)``; a new head."""
    lora, everything, head = of_digits[0].ways
    convolutions = [m for m in SmallResNet(1, 5).modules() if isinstance(m, nn.Conv2d)]
    shapes = [m.weight.shape for m in convolutions]
    factors = sum(2 * (o * kh + i * kw) for o, i, kh, kw in shapes)
    new_head = 128 * 5 + 5
    assert lora.trainable == factors + new_head
    assert lora.trainable == sum(row[3] for row in of_digits[0].rows)
    assert everything.trainable == sum(p.numel() for p in SmallResNet(1, 5).parameters())
    assert head.trainable == new_head


def test_the_files_give_the_outputs_without_gift(of_digits: tuple[Facts, Path]) -> None:
    """A plain network with ``W + B A``, in memory order, for every convolution agrees."""
    result, out = of_digits
    state, delta = torch.load(out / "base.pt"), torch.load(out / "lora_new_head.pt")
    plain = SmallResNet(1, 5)
    for name in [key.removesuffix("lora_B") for key in delta if key.endswith("lora_B")]:
        product = delta.pop(f"{name}lora_B") @ delta.pop(f"{name}lora_A")
        state[f"{name}weight"] += product.reshape(state[f"{name}weight"].shape)
    assert {"fc.weight", "bn1.running_mean"} <= delta.keys() <= state.keys()
    plain.load_state_dict(state | delta)
    images = digits().only(range(5, 10)).test.images
    assert result.outputs is not None
    torch.testing.assert_close(predict(plain, images), result.outputs, rtol=1e-4, atol=1e-4)


def test_file_sizes_are_those_on_the_disk(of_digits: tuple[Facts, Path]) -> None:
    result, out = of_digits
    assert result.ways[0].file_bytes == (out / "lora_new_head.pt").stat().st_size
    assert result.base_bytes == (out / "base.pt").stat().st_size
    assert result.ways[0].file_bytes < result.base_bytes / 10


def test_one_changed_value_is_not_the_same_base() -> None:
    net = SmallResNet(1, 5)
    other = SmallResNet(1, 5)
    other.load_state_dict(net.state_dict())
    assert same(net, other)
    other.bn1.running_mean[3] += 1e-7
    assert not same(net, other)
    assert not same(net, SmallResNet(1, 5).requires_grad_(False))


@pytest.mark.parametrize("layout", ["classes", "train_and_val"])
def test_half_of_the_classes_of_a_folder_are_learned(tmp_path: Path, layout: str) -> None:
    if layout == "classes":
        folder = write_images(tmp_path / "all", [*COLOURS], 8)
    else:
        folder = tmp_path / "all"
        write_images(folder / "train", [*COLOURS], 6)
        write_images(folder / "val", [*COLOURS], 2)
    out = tmp_path / "out"
    result = main(["--images", str(folder), "--scratch", "--steps", "2", "--out", str(out)])
    assert result.same_output
    assert result.same_base
    assert result.outputs is not None
    assert result.outputs.shape == (4, 2)  # a quarter of the images of two classes
    check_plots(result, out)


def check_plots(result: Facts, out: Path) -> None:
    assert out / "predictions.png" in result.images
    for file in result.images:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100


@pytest.mark.parametrize("weights", ["absent", "present"])
def test_two_classes_start_from_pretrained_weights_or_from_turned_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there
    if weights == "present":
        cache = tmp_path / "torch" / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        torch.save(resnet18().state_dict(), cache / Path(ResNet18_Weights.DEFAULT.url).name)
    folder = write_images(tmp_path / "all", ["blue", "red"], 4)
    out = tmp_path / "out"
    result = main(["--images", str(folder), "--steps", "2", "--out", str(out)])
    assert (result.base_accuracy is None) == (weights == "present")
    assert result.same_output
    assert result.same_base
    check_plots(result, out)


def test_a_big_folder_is_read_in_part_and_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules["gift.demo.data"].LIMITS, "train", 10)
    task = read_folder(write_images(tmp_path, ["blue", "red"], 16), size=8)
    assert task.train.labels.tolist() == [0] * 5 + [1] * 5
    assert task.train.images.shape == (10, 3, 8, 8)
    assert len(task.test) == 8


def no_folder(path: Path) -> None:
    pass


def a_file(path: Path) -> None:
    path.write_text("")


def one_class(path: Path) -> None:
    write_images(path, ["blue"], 3)


def lonely_image(path: Path) -> None:
    write_images(path, ["blue", "red"], 3)
    write_images(path, ["green"], 1)


def other_classes_in_val(path: Path) -> None:
    write_images(path / "train", ["blue", "red"], 2)
    write_images(path / "val", ["blue", "green"], 2)


def broken_image(path: Path) -> None:
    write_images(path, ["blue", "red"], 3)
    (path / "red" / "1.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "pictures does not exist"),
        (a_file, "pictures is not a folder"),
        (Path.mkdir, "these classes: [], expected at least two"),
        (one_class, "these classes: ['blue'], expected at least two"),
        (lonely_image, "classes ['green'] have fewer than two images"),
        (other_classes_in_val, "['green', 'red'] are in only one of train and val"),
        (broken_image, "1.png cannot be read as an image"),
    ],
)
def test_a_bad_folder_is_refused_in_plain_words(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    message: str,
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    make(folder)
    with pytest.raises(SystemExit) as exit:
        main(["--images", str(folder), "--scratch", "--out", str(out)])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_output_folder_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "all", ["blue", "red"], 2)
    with pytest.raises(SystemExit):
        main(["--images", str(folder), "--scratch", "--out", str(folder / "red" / "0.png")])
    assert "0.png cannot be made a folder" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # as if it were not installed
    with pytest.raises(SystemExit):
        main([])
    assert 'sklearn.datasets: pip install "gift-torch[demo]"' in capsys.readouterr().err


def test_as_a_command_it_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also its printed table is that of the trained parameters."""
    monkeypatch.setattr(sys, "argv", ["gift.demo", "--steps", "2"])
    monkeypatch.delitem(sys.modules, "gift.demo.__main__")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("gift.demo", run_name="__main__")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "blocks.2.conv2.lora_B       [384, 2]      768" in printed
    assert len(re.findall("bit for bit +yes", printed)) == 2
