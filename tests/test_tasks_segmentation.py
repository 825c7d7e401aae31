"""Masks: what is read, drawn, measured and refused, beside formulas and scikit-learn."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score
from torch import Tensor, nn

import gift
from gift import enable_fine_tuning
from gift.data import (
    DataError,
    PictureReader,
    SegmentationReader,
    mask_folders,
    mask_table,
    reader_from_config,
)
from gift.data.examples import IGNORED
from gift.errors import GiftWarning
from gift.factories.segmentation import segmentation_heads
from gift.jobs import Job, Run, run_job
from gift.strategies import (
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    SegmentationHeadStrategy,
)
from gift.training import Segmented, TrainingError, evaluate, finetune, predict
from gift.zoo import NetworkError, load_network
from tests.job_examples import CHEAP
from tests.small_files import image

READER = SegmentationReader(size=(16, 24))
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
COLOURS = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]


def scene(seed: int, width: int = 48, height: int = 32) -> tuple[Image.Image, np.ndarray]:
    """A warm disc and a cold rectangle on a real-looking ground, and the class of each pixel."""
    draw = np.random.default_rng(seed)
    pixels = np.asarray(image(width, height, seed=seed)).astype(float) * 0.3 + 80
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    left, top = draw.integers(2, width // 2), draw.integers(2, height // 2)
    mask[top : top + 10, left : left + 12] = 2
    mask[(x - draw.integers(8, width - 8)) ** 2 + (y - draw.integers(8, height - 8)) ** 2 < 49] = 1
    pixels[mask == 1] += (90, -40, -60)
    pixels[mask == 2] += (-60, -40, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def folders(path: Path, count: int = 6, start: int = 0, **form: Any) -> tuple[Path, Path]:
    (path / "images").mkdir(parents=True)
    (path / "masks").mkdir()
    for n in range(start, start + count):
        picture, mask = scene(n)
        picture.save(path / "images" / f"{n}.png")
        mask_image(mask, **form).save(path / "masks" / f"{n}.png")
    return path / "images", path / "masks"


def mask_image(mask: np.ndarray, form: str = "grey") -> Image.Image:
    if form == "colour":
        return Image.fromarray(np.array(COLOURS, np.uint8)[mask])
    if form == "scaled":
        return Image.fromarray(mask * 100)
    found = Image.fromarray(mask)
    if form == "palette":
        found.putpalette([value for colour in COLOURS for value in colour])
    return found


class Net(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, classes, 1),
        )  # fmt: skip


FORMS: dict[str, dict[str, Any]] = {
    "grey": {},
    "palette": {},
    "colour": {"colours": COLOURS},
    "scaled": {"values": [0, 100, 200]},
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_each_form_say_the_same(form: str, tmp_path: Path) -> None:
    found = mask_folders(*folders(tmp_path, form=form), READER, ["ground", "disc", "box"],
                         **FORMS[form])  # fmt: skip
    assert (found.task, found.classes) == ("segmentation", ("ground", "disc", "box"))
    for place in range(6):
        picture, mask = scene(place)
        x, y = found.dataset[place]
        nearest = np.asarray(Image.fromarray(mask).resize((24, 16), Image.Resampling.NEAREST))
        assert np.array_equal(y.numpy(), nearest)
        plain = PictureReader(size=(16, 24))(picture)
        assert torch.allclose(x, plain, atol=1e-6)


def test_class_numbers_are_found_and_colours_chosen(tmp_path: Path) -> None:
    found = mask_folders(*folders(tmp_path), READER)
    assert found.classes == ("0", "1", "2")
    assert found.details["colours"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


def test_images_and_masks_are_cropped_and_flipped_alike(tmp_path: Path) -> None:
    """The image is its own mask, in grey values."""
    grey = torch.arange(48 * 32).view(32, 48) % 256
    picture = Image.fromarray(grey.numpy().astype(np.uint8))
    reader = SegmentationReader(size=(32, 48), mean=(0.0,), std=(1.0,), interpolation="nearest")
    flipped = set()
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = reader.pair(picture, grey, augment=True)
        apart = (x[0] * 255).round().long() - y
        near = apart.abs() <= 1  # PIL and torch may round half a pixel to either side
        assert near.float().mean() > 0.6
        assert apart[near].float().mean().abs() < 0.35
        flipped.add(bool((y[:, 1:] < y[:, :-1]).float().mean() > 0.5))
    assert flipped == {True, False}
    torch.manual_seed(0)
    plain = reader.pair(picture, grey)[1]
    assert torch.equal(plain, grey)


def test_measures_are_those_of_all_pixels(tmp_path: Path) -> None:
    images, masks = folders(tmp_path)
    for file in masks.iterdir():
        mask = np.asarray(Image.open(file)).copy()
        mask[:3] = 255
        Image.fromarray(mask).save(file)
    data = mask_folders(images, masks, READER, ["ground", "disc", "box"])
    torch.manual_seed(0)
    net = Net()
    found = evaluate(net, data, device="cpu", batch_size=4)
    x = torch.stack([data.dataset[n][0] for n in range(6)])
    y = torch.stack([data.dataset[n][1] for n in range(6)])
    assert (y == IGNORED).any()
    with torch.no_grad():
        logits = net(x).double()
    expected = F.cross_entropy(logits, y).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    truth, said = y[y != IGNORED].numpy(), logits.argmax(1)[y != IGNORED].numpy()
    assert found["miou"] == pytest.approx(jaccard_score(truth, said, average="macro"), rel=1e-5)
    assert found["dice"] == pytest.approx(f1_score(truth, said, average="macro"), rel=1e-5)
    assert found["pixel_accuracy"] == pytest.approx((truth == said).mean(), rel=1e-5)


def test_a_job_learns_shapes_and_draws_them(tmp_path: Path) -> None:
    folders(tmp_path / "train", 24)
    folders(tmp_path / "val", 4, start=100)
    place = {part: {k: str(tmp_path / part / k) for k in ("images", "masks")}
             for part in ("train", "val")}  # fmt: skip
    job = Job(
        data={"kind": "mask_folders", "train": place["train"], "valid": place["val"],
              "options": {"classes": ["ground", "disc", "box"], "colours": COLOURS,
                          "augment": True},
              "reader": {"size": [32, 48]}},
        strategy="FullFineTuningStrategy", folder=str(tmp_path / "run"),
        training=CHEAP | {"epochs": 25, "lr": 0.02},
    )  # type: ignore[arg-type]  # fmt: skip
    torch.manual_seed(0)
    result = run_job(job, Net())
    assert result.after["miou"] > 0.7
    assert result.before["miou"] < 0.5
    assert sum(map(sum, result.confusion or [])) == 4 * 32 * 48
    run = Run(tmp_path / "run", Net())
    assert run.evaluate() == pytest.approx(result.after, abs=1e-5)
    [found] = run.predict([place["val"]["images"] + "/100.png"])
    assert isinstance(found, Segmented)
    picture, mask = scene(100)
    assert found.mask.shape == mask.shape
    assert jaccard_score(mask.ravel(), found.mask.numpy().ravel(), average="macro") > 0.6
    assert sum(found.shares.values()) == pytest.approx(1)
    assert ": ground 8" in str(found)
    found.save(tmp_path / "said.png")
    written = Image.open(tmp_path / "said.png")
    assert np.array_equal(np.asarray(written), found.mask.numpy())
    assert np.asarray(written.convert("RGB"))[found.mask.numpy() == 1].tolist()[0] == [255, 0, 0]
    over = np.asarray(found.overlay(0.5)).astype(float)
    expected = (np.asarray(picture) + np.array(COLOURS)[found.mask.numpy()]) / 2
    expected[found.mask.numpy() == 0] = np.asarray(picture)[found.mask.numpy() == 0]
    assert np.abs(over - expected).max() <= 1
    page = (tmp_path / "run/report.html").read_text()
    assert "disc" in page
    assert page.count("image, true mask, predicted mask:") == 2 * 4
    first = Image.open(io.BytesIO(result.samples[0].png))
    assert first.size == (3 * 48 + 2 * 4, 32)
    left = np.asarray(first.convert("RGB"))[:, :48].astype(int)
    assert np.abs(left - np.asarray(picture).astype(int)).max() <= 1


def test_pixels_of_any_size_are_predicted_at_the_size_of_the_image(tmp_path: Path) -> None:
    data = mask_folders(*folders(tmp_path), READER)
    net = Net()
    finetune(net, data, strategy=FullFineTuningStrategy(), epochs=1, **QUIET)
    found = predict(net, [scene(1)[0], scene(2, 60, 70)[0]])
    assert [tuple(one.mask.shape) for one in found] == [(32, 48), (70, 60)]
    [one] = predict(net, torch.zeros(1, 3, 8, 10))
    assert tuple(one.mask.shape) == (8, 10)


def test_one_logit_for_each_pixel(tmp_path: Path) -> None:
    images, masks = folders(tmp_path)
    for file in masks.iterdir():
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
    with pytest.raises(DataError, match=r"one class.*values=\[0, 255\].*ignored now: \[255\]"):
        mask_folders(images, masks, READER)
    with pytest.warns(GiftWarning, match=r"all pixels in the 6 masks.*of a; .255. is ignored"):
        mask_folders(images, masks, READER, ["a", "b"])
    data = mask_folders(images, masks, READER, ["a", "b"], values=[0, 255], ignore_index=None)
    net = Net(1)
    found = evaluate(net, data, device="cpu")
    x = torch.stack([data.dataset[n][0] for n in range(6)])
    y = torch.stack([data.dataset[n][1] for n in range(6)])
    with torch.no_grad():
        logits = net(x)[:, 0]
    expected = F.binary_cross_entropy_with_logits(logits.double(), y.double()).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    iou = jaccard_score(y.flatten(), (logits > 0).flatten(), average="macro")
    assert found["miou"] == pytest.approx(iou, rel=1e-5)
    finetune(net, data, strategy=FullFineTuningStrategy(), epochs=1, **QUIET)
    assert predict(net, [scene(1)[0]])[0].classes == ("a", "b")


# What is refused.


def odd_size(path: Path) -> None:
    scene(0, 20, 20)[0].convert("L").save(path / "masks/0.png")


def coloured(path: Path) -> None:
    mask_image(scene(0)[1], "colour").save(path / "masks/0.png")


def value_of_no_class(path: Path) -> None:
    Image.fromarray(scene(0)[1] + 7).save(path / "masks/0.png")


def damaged(path: Path) -> None:
    (path / "masks/1.png").write_bytes(b"no image")


def several(path: Path) -> None:
    Image.fromarray(scene(0)[1]).save(path / "masks/0.bmp")


def both(path: Path) -> None:
    (path / "masks/0.png").unlink()
    (path / "images/1.png").unlink()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no mask and no image": (both, {}, r"(?s)0.png: there is no mask.*1.png: there is no image"),
    "another size": (odd_size, {}, r"0.png is 20 x 20, its image 48 x 32 \(width x height\)"),
    "colours without meaning": (coloured, {}, r"has colours \(RGB\).*colours=\[\["),
    "a value of no class": (value_of_no_class, {"classes": ["a", "b", "c"]},
                            r"0.png has pixels of 7, 8.*expected 0, 1, 2, or \[255\]"),
    "not an image": (damaged, {}, "1.png cannot be read as an image"),
    "two masks": (several, {}, "there are several masks"),
    "colours and classes": (lambda p: 0, {"classes": ["a", "b"], "colours": COLOURS},
                            "3 colours for 2 classes"),
    "values twice": (lambda p: 0, {"values": [0, 0]}, "expected another one for each class"),
    "colour names": (lambda p: 0, {"colours": ["red", "blue"]}, "expected three numbers"),
    "the same colour": (lambda p: 0, {"colours": [[0, 0, 0], [0, 0, 0]]}, "the same colour"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_cannot_be_used_are_named(name: str, tmp_path: Path) -> None:
    spoil, options, message = REFUSED[name]
    images, masks = folders(tmp_path, 2)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        mask_folders(images, masks, READER, **options)


def test_a_colour_of_no_class_is_named_when_it_is_read(tmp_path: Path) -> None:
    images, masks = folders(tmp_path, 2, form="colour")
    with pytest.raises(DataError, match=r"pixels of \[0, 0, 255\], which are none of the 2"):
        mask_folders(images, masks, READER, ["a", "b"], colours=COLOURS[:2])


def test_folders_that_are_not_there_and_readers_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no folder .*x.*no folder .*y"):
        mask_folders(tmp_path / "x", tmp_path / "y", READER)
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="no images in"):
        mask_folders(tmp_path / "x", tmp_path / "x", READER)
    with pytest.raises(DataError, match="expected SegmentationReader"):
        mask_folders(*folders(tmp_path), PictureReader())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resize is 20, expected None"):
        SegmentationReader(size=16, resize=20)


def test_a_table_of_images_and_masks(tmp_path: Path) -> None:
    folders(tmp_path, 2)
    table = tmp_path / "t.csv"
    table.write_text("image,mask\nimages/0.png,masks/0.png\nimages/1.png,masks/1.png\n")
    found = mask_table(table, READER)
    assert len(found) == 2
    odd_size(tmp_path)
    with table.open("a") as file:
        file.write("images/2.png,masks/3.png\n")
    with pytest.raises(DataError, match=r"(?s)line 4: there is no image .*2.png.*line 4: .*3.png"):
        mask_table(table, READER)
    table.write_text("image,mask\nimages/0.png,masks/0.png\n")
    with pytest.raises(DataError, match=r"line 2: .*0.png is 20 x 20"):
        mask_table(table, READER)


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = mask_folders(*folders(tmp_path), READER)
    flat = nn.Sequential(Net(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TrainingError, match=r"expected logits .batch, classes, height, width."):
        evaluate(flat, data, device="cpu")
    with pytest.raises(TrainingError, match="distinguishes 2 classes, the examples have 3"):
        evaluate(Net(2), data, device="cpu")


@pytest.mark.parametrize("colours", [5, [[0, 0, 0]], [[0, 0]] * 3, [["x"] * 3] * 3])
def test_colours_that_a_file_makes_up_are_refused(colours: Any) -> None:
    from gift.core.io_spec import set_io_spec

    net = Net()
    set_io_spec(net, None, None, "segmentation", {"colours": colours})
    with pytest.raises(TrainingError, match="the colours of the classes"):
        predict(net, torch.zeros(1, 3, 4, 4))


# Networks by name and their heads.


def test_the_reader_is_plain_data() -> None:
    assert reader_from_config(json.loads(json.dumps(READER.to_config()))) == READER


@pytest.mark.parametrize(
    ("name", "options", "number"),
    [
        ("torchvision:lraspp_mobilenet_v3_large", {}, 2),
        ("torchvision:fcn_resnet50", {"aux_loss": True}, 2),
        ("torchvision:deeplabv3_mobilenet_v3_large", {}, 1),
        ("smp:unet", {"encoder_name": "resnet18", "classes": 5}, 1),
        ("smp:fpn", {"encoder_name": "resnet18", "classes": 5}, 1),
        ("smp:deeplabv3", {"encoder_name": "resnet18", "classes": 5}, 1),
    ],
)
def test_heads_of_networks_by_name_are_found_and_replaced(
    name: str, options: dict[str, Any], number: int
) -> None:
    loaded = load_network(name, None, **options)
    assert loaded.task == "segmentation"
    assert isinstance(loaded.reader, SegmentationReader)
    assert len(segmentation_heads(loaded.net)) == number
    report = enable_fine_tuning(loaded.net, SegmentationHeadStrategy(4))
    assert not report.unmatched
    out: Any = loaded.net.eval()(torch.zeros(1, 3, 64, 64))
    assert (out["out"] if isinstance(out, dict) else out).shape[:2] == (1, 4)


def segformer(folder: Path) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4,
        decoder_hidden_size=8, num_labels=5,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


def test_segformer_of_transformers_with_its_reader(tmp_path: Path) -> None:
    from transformers import SegformerImageProcessor

    data = mask_folders(*folders(tmp_path / "data"), SegmentationReader(size=(32, 64)))
    with pytest.warns(GiftWarning, match="nothing says how"):
        bare = load_network(f"transformers:{segformer(tmp_path / 'model')}", task="segmentation")
    assert bare.reader is None
    SegformerImageProcessor(size={"height": 32, "width": 64}).save_pretrained(tmp_path / "model")
    loaded = load_network(f"transformers:{tmp_path / 'model'}")
    assert loaded.task == "segmentation"
    assert isinstance(loaded.reader, SegmentationReader)
    assert loaded.reader.size == (32, 64)
    result = finetune(loaded.net, data, data, strategy=SegmentationHeadStrategy(3), epochs=1,
                      **QUIET)  # fmt: skip
    assert result.trained == 8 * 3 + 3
    assert loaded.net.config.num_labels == 3
    with torch.no_grad():
        logits = loaded.net.eval()(torch.stack([data.dataset[n][0] for n in range(6)])).logits
    assert logits.shape[-2:] == (8, 16)  # a quarter
    y = torch.stack([data.dataset[n][1] for n in range(6)])
    scaled = F.interpolate(logits, (32, 64), mode="bilinear")
    assert result.after["loss"] == pytest.approx(F.cross_entropy(scaled, y).item(), rel=1e-4)


def test_auxiliary_heads_take_part_in_training(tmp_path: Path) -> None:
    """The sum of both losses, the auxiliary one by half, as in torchvision's references."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier, self.aux_classifier = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.classifier(x), "aux": self.aux_classifier(x)}

    torch.manual_seed(0)
    net, data = Two(), mask_folders(*folders(tmp_path, 4), READER)
    x = torch.stack([data.dataset[n][0] for n in range(4)])
    y = torch.stack([data.dataset[n][1] for n in range(4)])
    with torch.no_grad():
        both = net(x)
        expected = F.cross_entropy(both["out"], y) + 0.5 * F.cross_entropy(both["aux"], y)
    result = finetune(net, data, strategy=FullFineTuningStrategy(), epochs=1, batch_size=4, **QUIET)
    assert result.steps[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_strategy_is_kept_in_files(tmp_path: Path) -> None:
    net = Net(5)
    enable_fine_tuning(net, SegmentationHeadStrategy(2))
    gift.save(net, tmp_path / "d.safetensors")
    torch.manual_seed(1)
    other = Net(5)
    gift.load(other, tmp_path / "d.safetensors", check_base=False)
    assert torch.equal(other[4].weight, net[4].weight)  # type: ignore[arg-type]


def test_heads_of_classifiers_may_be_convolutions() -> None:
    net = load_network("torchvision:squeezenet1_1", None).net
    enable_fine_tuning(net, HeadReplacementStrategy(3))
    assert net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smp:unett", {}, "closest: .'unet'"),
        ("smp:unet", {"encoder_name": "resnet19"}, "closest: .'resnet18'|closest"),
        ("smp:unet", {"encoder_name": "../x"}, "the name of an encoder"),
        ("smp:unet", {"activation": "x"}, "activation .not known"),
        ("smp:unet", {"task": "language"}, "is for segmentation"),
        ("torchvision:fcn_resnet50", {"task": "detection"}, "is for segmentation, not for"),
    ],
)
def test_networks_that_cannot_be_made_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        load_network(name, None, **options)
