"""Examples from data sets: torchvision's, COCO, Hugging Face's, and plain texts."""

import json
import urllib.error
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CocoDetection

from gift.data import (
    DataError,
    PictureReader,
    TextReader,
    coco,
    hugging_face,
    language_text,
    torchvision_dataset,
)
from gift.errors import GiftWarning
from tests.small_files import (
    box,
    cifar10,
    class_images,
    coco_files,
    imagenet,
    mnist,
    saved,
    word_tokenizer,
)

SMALL = PictureReader(size=16)
WHOLE = {size: PictureReader(size, mean=(0.0,) * 3, std=(1.0,) * 3) for size in (28, 32)}


# torchvision


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_becomes_red_green_and_blue(split: str, tmp_path: Path) -> None:
    pixels = mnist(tmp_path, [7, 0, 9])
    examples = torchvision_dataset("MNIST", tmp_path, split, WHOLE[28])
    assert [label for _, label in examples.dataset] == [7, 0, 9]  # type: ignore[attr-defined]
    assert examples.classes is not None
    assert (len(examples.classes), examples.classes[7]) == (10, "7 - seven")
    for (tensor, _), expected in zip(examples.dataset, pixels, strict=True):  # type: ignore[call-overload]
        assert torch.equal(tensor, (torch.tensor(expected) / 255).expand(3, 28, 28))


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10(split: str, tmp_path: Path, monkeypatch: Any) -> None:
    pixels = cifar10(tmp_path, [3, 9], monkeypatch)
    examples = torchvision_dataset("CIFAR10", tmp_path, split, WHOLE[32])
    assert examples.classes is not None
    assert (examples.classes[3], examples.classes[9]) == ("cat", "truck")
    inputs, labels = next(iter(DataLoader(examples.dataset, 2, collate_fn=examples.collate)))
    assert torch.equal(inputs, torch.tensor(pixels) / 255)
    assert labels.tolist() == [3, 9]


def test_imagenet_names_its_classes_by_their_synonyms(tmp_path: Path) -> None:
    imagenet(tmp_path)
    for split in ("train", "val"):
        examples = torchvision_dataset("ImageNet", tmp_path, split, SMALL)
        assert examples.classes == ("tench, Tinca tinca", "goldfish, Carassius auratus")
        assert [label for _, label in examples.dataset] == [0, 1]  # type: ignore[attr-defined]


def test_a_damaged_image_of_imagenet_is_named(tmp_path: Path) -> None:
    imagenet(tmp_path)
    path = tmp_path / "train" / "n01443537" / "n01443537_1.JPEG"
    path.write_bytes(path.read_bytes()[:400])
    examples = torchvision_dataset("ImageNet", tmp_path, "train", SMALL)
    with pytest.raises(DataError, match=r"n01443537_1.JPEG cannot be read: .+"):
        examples.dataset[1]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("MNST", "train", "no data set 'MNST', closest: .*'MNIST'"),
        ("wrap_dataset_for_transforms_v2", "train", "no data set"),
        ("MNIST", "val", "'train' and 'test', not 'val'"),
        ("MNIST", None, "'train' and 'test', not None"),
        ("CIFAR10", "train", "not found or corrupted.*download=True"),
        ("ImageNet", "train", "ImageNet in .*"),
        ("SVHN", "valid", "'valid'"),
        ("EuroSAT", "train", "not divided: give split=None"),
        ("FakeData", None, None),
        ("CocoDetection", None, "CocoDetection"),
    ],
)
def test_what_torchvision_cannot_give_is_refused(
    name: str, split: str | None, message: str | None, tmp_path: Path
) -> None:
    if message is None:
        examples = torchvision_dataset(name, tmp_path, split, SMALL)  # made of random numbers
        assert examples.dataset[0][0].shape == (3, 16, 16)
        return
    with pytest.raises(DataError, match=f"(?s){message}"):
        torchvision_dataset(name, tmp_path, split, SMALL)


def test_a_download_that_fails_is_reported(tmp_path: Path, monkeypatch: Any) -> None:
    def unreachable(*args: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    with pytest.raises(DataError, match=r"CIFAR10 in .*no route to host"):
        torchvision_dataset("CIFAR10", tmp_path, "train", SMALL, download=True)


# COCO

TRIANGLE = [[10.0, 5.0, 30.0, 5.0, 10.0, 25.0]]
RUNS = {"size": [30, 40], "counts": [5 * 30, 60, 1200 - 5 * 30 - 60]}
COUNTED = pytest.mark.filterwarnings("ignore:.*boxes, ")
BOXES = [
    box(1, 7, 90, [10, 5, 20, 20], segmentation=TRIANGLE, area=200, iscrowd=0),
    box(2, 7, 3, [5, 0, 2, 30], segmentation=RUNS, area=60, iscrowd=0),
    box(3, 7, 18, [0, 0, 40, 30], segmentation=RUNS, area=900, iscrowd=1),
    box(4, 9, 18, [-4, 20, 20.5, 40], segmentation=TRIANGLE, area=9, iscrowd=0),
    box(5, 9, 18, [3, 3, 0, 5], segmentation=TRIANGLE, area=0, iscrowd=0),
    box(6, 9, 18, [50, 3, 9, 5], segmentation=TRIANGLE, area=0, iscrowd=0),
]


def test_boxes_that_are_cut_or_left_out_are_counted(tmp_path: Path) -> None:
    with pytest.warns(GiftWarning, match=(
        r"instances.json: of 6 boxes, 1 are empty and left out; 1 crowds are left out; "
        r"1 lie outside of their image and are left out; 1 reach beyond their image and are cut$"
    )):  # fmt: skip
        coco(*coco_files(tmp_path, BOXES))
    rounded = [box(1, 7, 3, [-0.5, 0, 40.9, 30])]
    coco(*coco_files(tmp_path / "rounded", rounded))  # without a warning


@COUNTED
def test_boxes_of_coco_are_as_torchvision_takes_them(tmp_path: Path) -> None:
    examples = coco(*coco_files(tmp_path, BOXES))
    assert examples.task == "detection"
    assert examples.classes == ("__background__", "car", "cat", "dog")
    images, targets = next(iter(DataLoader(examples.dataset, 3, collate_fn=examples.collate)))
    assert [p.shape for p in images] == [(3, 30, 40)] * 3
    assert [t["labels"].tolist() for t in targets] == [[3, 1], [], [2]]
    assert [t["boxes"].tolist() for t in targets] == [
        [[10, 5, 30, 25], [5, 0, 7, 30]], [], [[0, 20, 16.5, 30]],
    ]  # fmt: skip
    assert targets[1]["boxes"].shape == (0, 4)
    its = CocoDetection(str(tmp_path / "pictures"), str(tmp_path / "instances.json"))
    for own, (other, _) in zip(images, its, strict=True):
        assert torch.equal(own, as_tensor(other))


def as_tensor(shown: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(shown)).permute(2, 0, 1) / 255


@COUNTED
def test_masks_of_coco_are_those_of_its_own_tools(tmp_path: Path) -> None:
    examples = coco(*coco_files(tmp_path, BOXES), masks=True)
    its = COCO(tmp_path / "instances.json")
    own = examples.dataset[0][1]["masks"]
    for mask, number in zip(own, (1, 2), strict=True):
        assert torch.equal(mask, torch.tensor(its.annToMask(its.anns[number])))
    assert examples.dataset[1][1]["masks"].shape == (0, 30, 40)


@COUNTED
def test_images_and_boxes_are_mirrored_together(tmp_path: Path) -> None:
    files = coco_files(tmp_path, BOXES)
    plain, augmented = (coco(*files, masks=True, augment=augment) for augment in (False, True))
    shown, targets = plain.dataset[0]
    seen = set()
    for _ in range(12):
        other, found = augmented.dataset[0]
        is_mirrored = not torch.equal(other, shown)
        seen.add(is_mirrored)
        assert torch.equal(other, shown.flip(-1) if is_mirrored else shown)
        assert torch.equal(found["labels"], targets["labels"])
        for mask, expected in zip(found["masks"], targets["masks"], strict=True):
            assert torch.equal(mask, expected.flip(-1) if is_mirrored else expected)
        left, top, right, bottom = targets["boxes"].unbind(1)
        if is_mirrored:
            left, right = 40 - right, 40 - left
        assert torch.equal(found["boxes"], torch.stack([left, top, right, bottom], 1))
    assert seen == {True, False}


@COUNTED
def test_validation_boxes_are_numbered_as_those_for_training(tmp_path: Path) -> None:
    train = coco(*coco_files(tmp_path / "train", BOXES))
    images, path = coco_files(tmp_path / "val", [box(1, 7, 1, [1, 1, 5, 5])])
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "unused"}]
    path.write_text(json.dumps(content))
    valid = coco(images, path, classes=train.classes)
    assert valid.classes == train.classes
    assert valid.dataset[0][1]["labels"].tolist() == [3]
    with pytest.raises(DataError, match="annotation 1: 'dog' is none of the classes car, cat"):
        coco(images, path, classes=["car", "cat"])


def test_all_that_is_wrong_with_boxes_is_reported_at_once(tmp_path: Path) -> None:
    wrong = [
        box(1, 70, 3, [1, 1, 5, 5]),
        box(2, 7, 4, [1, 1, 5, 5]),
        box(3, 7, 3, [1, 1, 5]),
        box(4, 7, 3, [1, 1, float("nan"), 5]),
        box(5, 7, 3, [1, 1, 5, 5]),
    ]
    images, path = coco_files(tmp_path, wrong)
    (images / f"{1:012}.png").unlink()
    with pytest.raises(DataError) as caught:
        coco(images, path, masks=True)
    for part in ("image 8: there is no image", "annotation 1: there is no image 70",
                 "annotation 2: there is no category 4", "annotation 3: the box is [1, 1, 5]",
                 "annotation 4: the box is", "annotation 5: there is no segmentation"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "categories": [{"id": 1}]}', "no list 'annotations'.*\\[0\\] has no name"),
        ('{"images": [], "categories": [], "annotations": []}', "there are no boxes"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
         '{"id": 1, "name": "b"}]}', "there are 2 with id 1"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_coco_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    with pytest.raises(DataError, match="there is no file"):
        coco(tmp_path, path)
    path.write_text(content)
    with pytest.raises(DataError, match=f"(?s){message}"):
        coco(tmp_path, path)


@COUNTED
def test_boxes_for_a_image_of_another_size_are_refused(tmp_path: Path) -> None:
    images, path = coco_files(tmp_path, BOXES)
    saved(images / f"{0:012}.png", width=30, height=40)
    with pytest.raises(DataError, match=r"000.png is 30 x 40, its boxes .* 40 x 30"):
        coco(images, path).dataset[0]


# Plain texts


def test_texts_are_packed_one_after_the_other(tmp_path: Path) -> None:
    texts = ["a very good film , a bad film", "a film", "very bad"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenizer = word_tokenizer()
    all_ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], 2]]
    reader = TextReader(tokenizer)
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for path, expected in ((tmp_path, all_ids), (files, all_ids), (files[0], all_ids[:9])):
        examples = language_text(path, reader, length=4)
        rows = [row["input_ids"].tolist() for row in examples.dataset]  # type: ignore[attr-defined]
        assert rows == [expected[i : i + 4] for i in range(0, len(expected) // 4 * 4, 4)]
    batch = next(iter(DataLoader(examples.dataset, 2, collate_fn=examples.collate)))
    assert examples.task == "language"
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_the_mark_of_a_text_in_utf_8_is_no_part_of_it(tmp_path: Path) -> None:
    """Some editors begin a file with U+FEFF."""
    (tmp_path / "plain.txt").write_text("a good film")
    (tmp_path / "marked.txt").write_text("a good film", encoding="utf-8-sig")
    reader = TextReader(word_tokenizer())
    rows = [
        language_text(tmp_path / name, reader, length=3).dataset[0]["input_ids"].tolist()
        for name in ("plain.txt", "marked.txt")
    ]
    assert rows[0] == rows[1] == word_tokenizer()("a good film")["input_ids"]


def test_texts_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    reader = TextReader(word_tokenizer())
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a good film")
    with pytest.raises(DataError) as caught:
        language_text([tmp_path / name for name in ("empty", "latin.txt", "absent")], reader)
    for part in ("no .txt files in this folder", "not text in UTF-8", "absent: there is no such"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="4 tokens, fewer than one row has: 128"):
        language_text(tmp_path / "short.txt", reader)
    with pytest.raises(DataError, match="length is 1"):
        language_text(tmp_path / "short.txt", reader, length=1)


# Hugging Face


def reviews(labels: Any = (1, 0), **features: Any) -> datasets.Dataset:
    rows = {"text": ["a good film", "bad"][: len(labels)], "label": list(labels)}
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds | features))


def test_texts_of_hugging_face_from_everywhere(tmp_path: Path) -> None:
    data = reviews()
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "all")
    files = tmp_path / "files"
    files.mkdir()
    (files / "train.csv").write_text("text,label\na good film,pos\nbad,neg\n")
    everything = (
        data,
        datasets.DatasetDict(train=data),
        tmp_path / "one",
        str(tmp_path / "all"),
        files,
    )
    for given in everything:
        kwargs = {"input": "text", "label": "label"} if given is files else {}
        examples = hugging_face(given, TextReader(word_tokenizer()), **kwargs)
        batch = next(iter(DataLoader(examples.dataset, 2, collate_fn=examples.collate)))
        assert batch["input_ids"].tolist() == [[3, 4, 6], [5, 0, 0]]
        assert batch["labels"].tolist() == [1, 0]
        assert examples.classes == ("neg", "pos")


def test_images_of_hugging_face(tmp_path: Path) -> None:
    folder = class_images(tmp_path / "pictures", ant=1, bee=2)
    data = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache")
    )
    examples = hugging_face(data, SMALL)
    assert examples.classes == ("ant", "bee")
    tensor, label = examples.dataset[0]
    assert torch.equal(tensor, SMALL(folder / "ant" / "0.png"))
    assert label == 0


def test_a_damaged_image_of_hugging_face_is_named(tmp_path: Path) -> None:
    good = saved(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(good.read_bytes()[:200])
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    rows = {"image": [str(good), str(tmp_path / "b.png")], "label": ["x", "y"]}
    examples = hugging_face(datasets.Dataset.from_dict(rows, features=features), SMALL)
    assert examples.dataset[0][1] == 0
    with pytest.raises(DataError, match=r"row 1 cannot be read: .+"):
        examples.dataset[1]


@pytest.mark.parametrize(
    ("values", "kind", "classes", "expected", "numbers"),
    [
        (["b", "a"], datasets.Value("string"), None, ("a", "b"), [1, 0]),
        ([True, False], datasets.Value("bool"), None, ("0", "1"), [1, 0]),
        ([5, 3], datasets.Value("int64"), None, ("3", "5"), [1, 0]),
        ([1, 0], datasets.ClassLabel(names=["n", "p"]), ("p", "n"), ("p", "n"), [0, 1]),
        ([1, 0], datasets.ClassLabel(names=["0", "1"]), ("bad", "good"), ("bad", "good"), [1, 0]),
        ([1, 0], datasets.ClassLabel(names=["n", "p"]), ("bad", "good"), ("bad", "good"), [1, 0]),
    ],
)
def test_classes_of_hugging_face(
    values: Any, kind: Any, classes: Any, expected: Any, numbers: list[int]
) -> None:
    examples = hugging_face(reviews(values, label=kind), str.split, label="label", input="text",
                            classes=classes)  # type: ignore[arg-type]  # fmt: skip
    assert examples.classes == expected
    assert [label for _, label in examples.dataset] == numbers  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (reviews, {"label": "gold"}, "no column 'gold', only .*'label', 'text'"),
        (reviews, {"input": "label2", "pair": "b"}, "(?s)'label2'.*'b'"),
        (lambda: reviews((-1, 0)), {}, r"row 0: no label \(-1\)"),
        (lambda: reviews((1, 0), label=datasets.Value("int64")), {"classes": ("a",)},
         "row 0: label 1 is out of range"),
        (lambda: reviews(label=datasets.Value("int64")).rename_column("label", "x"), {},
         "which column has the classes.*label= says so"),
        (lambda: reviews().add_column("second", ["a", "b"]).rename_column("text", "first"), {},
         "which column has the inputs.*input= says so, one of .'first', 'second'."),
        (lambda: datasets.DatasetDict(test=reviews()), {}, "splits .'test'., not 'train'"),
        (lambda: {1, 2}, {}, "got a set"),
        (lambda: reviews().to_iterable_dataset(), {}, "stream without a length"),
        (lambda: reviews([[1], [0, 1]], label=datasets.List(datasets.Value("int64"))),
         {"label": "label"}, r"no class for each row, but \[1\]"),
        (lambda: reviews([0.5, 1.0], label=datasets.Value("float64")), {}, "but 0.5"),
        (lambda: "no/such-data", {}, "(?s)'no/such-data' cannot be loaded.*save_to_disk"),
    ],
)  # fmt: skip
def test_what_hugging_face_cannot_give_is_refused(data: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hugging_face(data(), TextReader(word_tokenizer()), **options)
