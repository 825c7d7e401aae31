"""Readers, and examples from folders, tables and tensors."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification

from gift.data import (
    DataError,
    DetectorReader,
    PictureReader,
    TextReader,
    class_folders,
    labelled,
    picture_table,
    reader_from_config,
    tensors,
    text_table,
)
from tests.small_files import class_images, image, saved, word_tokenizer

SMALL = PictureReader(size=16)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA"])
@pytest.mark.parametrize(
    ("size", "resize", "interpolation"),
    [(24, 28, "bilinear"), (28, 28, "bicubic"), (28, None, "nearest"), (30, 64, "bilinear")],
)
def test_a_image_is_read_as_torchvision_reads_it_for_its_weights(
    mode: str, size: int, resize: int | None, interpolation: str
) -> None:
    reader = PictureReader(size=size, resize=resize, interpolation=interpolation)
    its = ImageClassification(
        crop_size=size, resize_size=resize or size, interpolation=InterpolationMode(interpolation)
    )
    for width, height in ((40, 30), (31, 57), (100, 20)):
        shown = image(width, height, mode)
        assert torch.equal(reader(shown), its(shown.convert("RGB")))


def test_a_image_that_is_not_square_fills_the_tensor() -> None:
    pixels = torch.arange(8, dtype=torch.uint8).reshape(1, 2, 4) * 30
    shown = Image.fromarray(pixels[0].numpy())
    reader = PictureReader(size=(2, 4), mean=(0.0,), std=(1.0,))
    assert torch.equal(reader(shown), pixels / 255)
    both = PictureReader(size=(2, 2), resize=(2, 4), mean=(0.0,), std=(1.0,))
    assert torch.equal(both(shown), pixels[:, :, 1:3] / 255)


def test_a_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image().save(tmp_path / "turned.png", exif=exif)
    turned = image().transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(SMALL(tmp_path / "turned.png"), SMALL(turned))


def test_sixteen_bits_of_grey_are_not_cut_off(tmp_path: Path) -> None:
    values = (np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    reader = PictureReader(size=16, mean=(0.0,), std=(1.0,))
    found = reader(tmp_path / "deep.png")[0]
    torch.testing.assert_close(found, torch.tensor(values / 65535).float(), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_is_that_of_torchvision(flip: bool) -> None:
    reader = PictureReader(size=16, scale=(0.3, 0.9), flip=flip)
    its = v2.Compose([
        v2.RandomResizedCrop(16, scale=(0.3, 0.9), antialias=True),
        v2.RandomHorizontalFlip(0.5 if flip else 0.0),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(reader.mean, reader.std),
    ])  # fmt: skip
    for seed in range(6):
        torch.manual_seed(seed)
        own = reader.augmented(image())
        torch.manual_seed(seed)
        torch.testing.assert_close(own, torch.Tensor(its(image())))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": (3, 4, 5)}, "expected a whole number"),
        ({"size": True}, "size is True"),
        ({"size": 32, "resize": 16}, "resize is 16"),
        ({"size": 32, "resize": (64, 16)}, "resize is"),
        ({"mean": (0.5,)}, "expected 3 of each"),
        ({"std": (1.0, 0.0, 1.0)}, "more than 0"),
        ({"interpolation": "cubic", "scale": (0.0, 2.0)}, "bicubic.*two shares"),
    ],
)
def test_a_reader_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PictureReader(**settings)


def test_texts_are_padded_and_cut(tmp_path: Path) -> None:
    reader = TextReader(word_tokenizer(), max_length=4)
    batch = reader.collate([reader("a good film"), reader(("a bad film", "very bad"))])
    assert batch["input_ids"].tolist() == [[3, 4, 6, 0], [3, 5, 8, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_tokenizer_without_padding_pads_with_its_end_and_stays_as_it_is() -> None:
    tokenizer = word_tokenizer(pad=False)
    reader = TextReader(tokenizer)
    batch = reader.collate([reader("a"), reader("a a")])
    assert batch["input_ids"].tolist() == [[3, 2], [3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("raw", [3, None, ["a", 3], b"a"])
def test_what_is_no_text_is_refused(raw: Any) -> None:
    with pytest.raises(DataError, match="expected a text or a pair of texts"):
        TextReader(word_tokenizer())(raw)


READERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "default": (PictureReader, image()),
    "picture": (
        lambda: PictureReader((20, 24), (32, 30), (0.1,), (0.3,), "bicubic", (0.5, 1.0), False),
        image(),
    ),
    "detector": (DetectorReader, image()),
    "text": (lambda: TextReader(word_tokenizer(), 3), "a very good film"),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_reader_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    make, raw = READERS[name]
    reader = make()
    config = json.loads(json.dumps(reader.to_config(tmp_path)))
    again = [reader_from_config(config, tmp_path), pickle.loads(pickle.dumps(reader))]
    if name == "text":
        named = TextReader(again[0].tokenizer).to_config()  # it has a folder now
        again.append(reader_from_config(named | {"max_length": 3}))
    for other in again:
        own, its = (one.collate([one(raw), one(raw)]) for one in (reader, other))
        torch.testing.assert_close(own, its, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "None, expected one of"),
        ({"kind": "sound"}, "'sound', expected one of.*picture"),
        ({"kind": []}, "expected one of"),
        ({"kind": "picture", "sizes": 3}, "no .'sizes'., but .*'size'"),
        ({"kind": "picture", "size": "big"}, "size is 'big'"),
        ({"kind": "picture", "mean": 3}, "describes no reader"),
        ({"kind": "text"}, "describes no reader.*tokenizer"),
        ({"kind": "text", "tokenizer": "no/such folder"}, "no tokenizer 'no/such folder'"),
    ],
)
def test_a_file_that_describes_no_reader_is_refused(config: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        reader_from_config(config)


def test_a_tokenizer_without_a_name_needs_a_folder() -> None:
    with pytest.raises(DataError, match="give a folder"):
        TextReader(word_tokenizer()).to_config()


# Damaged images


def damaged(folder: Path) -> dict[str, Path]:
    """Files that are no images, though their names say so."""
    whole = {end: saved(folder / f"whole.{end}", width=300, height=300) for end in ("jpg", "png")}
    files = {"empty.png": b"", "text.jpg": b"I am no picture"}
    files |= {f"half.{end}": path.read_bytes()[:900] for end, path in whole.items()}
    corrupt = bytearray(whole["png"].read_bytes())
    corrupt[200:260] = bytes(60)
    files["corrupt.png"] = bytes(corrupt)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    names = [*files, "folder.png", "absent.png"]
    return {name: folder / name for name in names}


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    for name, path in damaged(tmp_path).items():
        for raw in (path, str(path)):
            with pytest.raises(DataError, match=f"{name} cannot be read as an image: .+"):
                SMALL(raw)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_while_training(workers: int, tmp_path: Path) -> None:
    folder = class_images(tmp_path / "train", ant=2, bee=1)
    (folder / "bee" / "broken.png").write_bytes((folder / "bee" / "0.png").read_bytes()[:500])
    examples = class_folders(folder, SMALL, augment=True)
    loader: Any = DataLoader(examples.dataset, 4, collate_fn=examples.collate, num_workers=workers)
    with pytest.raises(DataError, match=r"bee/broken.png cannot be read"):
        next(iter(loader))


@pytest.mark.parametrize("raw", [3, None, np.zeros((3, 3)), torch.zeros(3, 4, 4)])
def test_what_is_no_image_is_refused(raw: Any) -> None:
    with pytest.raises(DataError, match="expected an image of PIL or the path of one"):
        SMALL(raw)


# Folders


def test_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    folder = class_images(tmp_path, wasp=3, ant=2, bee=1)
    saved(folder / "ant" / "more" / "deep" / "X.JPG")
    examples = class_folders(folder, SMALL)
    its = ImageFolder(str(folder), transform=SMALL)
    assert list(examples.classes or ()) == its.classes == ["ant", "bee", "wasp"]
    assert len(examples) == len(its) == 7
    for own, other in zip(examples.dataset, its, strict=True):  # type: ignore[call-overload]
        assert torch.equal(own[0], other[0])
        assert own[1] == other[1]


def test_a_batch_is_a_pair_of_tensors(tmp_path: Path) -> None:
    examples = class_folders(class_images(tmp_path, ant=2, bee=1), SMALL)
    inputs, labels = next(iter(DataLoader(examples.dataset, 3, collate_fn=examples.collate)))
    assert inputs.shape == (3, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1]
    assert labels.dtype == torch.int64


def test_what_a_computer_leaves_in_folders_does_not_count(tmp_path: Path) -> None:
    folder = class_images(tmp_path, ant=1, bee=1)
    for name in ("ant/.DS_Store", "ant/._0.png", "ant/Thumbs.db", ".cache/0.png", "__MACOSX/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert len(class_folders(folder, SMALL)) == 2


def test_validation_folders_are_numbered_as_those_for_training(tmp_path: Path) -> None:
    train = class_folders(class_images(tmp_path / "train", ant=1, bee=1, wasp=1), SMALL)
    folder = class_images(tmp_path / "val", bee=1, wasp=2)
    valid = class_folders(folder, SMALL, classes=train.classes)
    assert valid.classes == train.classes
    assert [label for _, label in valid.dataset] == [1, 2, 2]  # type: ignore[attr-defined]


def test_all_that_is_wrong_in_folders_is_reported_at_once(tmp_path: Path) -> None:
    folder = class_images(tmp_path, ant=1, bee=1, cat=1)
    (folder / "dog").mkdir()
    (folder / "bee" / "none.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        class_folders(folder, SMALL, classes=["ant", "bee", "dog"])
    for part in ("folder cat: 'cat' is none of the classes ant, bee, dog",
                 "folder dog: no images", "bee/none.png: empty file"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "there is no such folder"),
        (lambda folder: saved(folder / "a.png"), "this is not a folder"),
        (lambda folder: folder, "expected one for each class"),
        (lambda folder: class_images(folder, ant=1), "no more than one class, ant"),
    ],
)
def test_what_are_no_class_folders_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        class_folders(make(tmp_path), SMALL)


# Tables

ROWS = [("a joy", "1"), ('so "deep"', "0"), ("naïve ...", "1")]
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "x.csv": ('text,label\na joy,1\n"so ""deep""",0\nnaïve ...,1\n', {}),
    "bom.csv": ('\ufefftext,label\r\na joy,1\r\n"so ""deep""",0\r\n\r\nnaïve ...,1', {}),
    "other.csv": ('id,label,text\n1,1,a joy\n2,0,"so ""deep"""\n3,1,naïve ...\n', {}),
    "x.tsv": ('a joy\t1\nso "deep"\t0\nnaïve ...\t1\n', {"text": 0, "label": 1}),
    "named.tsv": ('sentence\tgold\na joy\t1\nso "deep"\t0\nnaïve ...\t1\n',
                  {"text": "sentence", "label": "gold"}),
    "x.txt": ('1\ta joy\n0\tso "deep"\n1\tnaïve ...', {"text": 1, "label": 0}),
    "semicolon.csv": ('text;label\na joy;1\n"so ""deep""";0\nnaïve ...;1', {"delimiter": ";"}),
}  # fmt: skip


def words(raw: Any) -> Any:
    return raw


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_all_sorts_say_the_same(name: str, tmp_path: Path) -> None:
    content, options = TABLES[name]
    (tmp_path / name).write_bytes(content.encode())
    examples = text_table(tmp_path / name, words, **options)  # type: ignore[arg-type]
    assert examples.classes == ("0", "1")
    assert list(examples.dataset) == [(t, int(n)) for t, n in ROWS]  # type: ignore[call-overload]


def test_quotes_may_span_lines_and_texts_be_long(tmp_path: Path) -> None:
    long = "very " * 50_000
    path = tmp_path / "x.csv"
    path.write_text(f'text,label\n"one\ntwo",b\n{long},a\n')
    examples = text_table(path, words)  # type: ignore[arg-type]
    assert list(examples.dataset) == [("one\ntwo", 1), (long, 0)]  # type: ignore[call-overload]


def test_texts_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,more,label\na film,very good,pos\na,bad,neg\n")
    reader = TextReader(word_tokenizer())
    for pair, ids in ((None, [[3, 6], [3, 0]]), ("more", [[3, 6, 8, 4], [3, 5, 0, 0]])):
        examples = text_table(path, reader, pair=pair)
        batch = next(iter(DataLoader(examples.dataset, 2, collate_fn=examples.collate)))
        assert batch["input_ids"].tolist() == ids
        assert batch["labels"].tolist() == [1, 0]
        assert examples.classes == ("neg", "pos")


@pytest.mark.parametrize(
    ("labels", "classes", "expected", "numbers"),
    [
        (["wasp", "ant", "bee"], None, ("ant", "bee", "wasp"), [2, 0, 1]),
        (["10", "9", "-1"], None, ("-1", "9", "10"), [2, 1, 0]),
        (["b", "a"], ("b", "a", "c"), ("b", "a", "c"), [0, 1]),
        (["0", "1"], ("neg", "pos"), ("neg", "pos"), [0, 1]),
        (["1", "0"], ("1", "0"), ("1", "0"), [0, 1]),  # names, not places
        (["1", "one"], None, ("1", "one"), [0, 1]),
        (["07", "7", "9" * 5000], None, ("07", "7", "9" * 5000), [0, 1, 2]),
        (["7", "07", "8"], None, ("07", "7", "8"), [1, 0, 2]),
    ],
)
def test_classes_have_an_order(
    labels: list[str], classes: Any, expected: Any, numbers: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("".join(f"text\t{label}\n" for label in labels))
    examples = text_table(path, words, 0, 1, classes=classes)  # type: ignore[arg-type]
    assert examples.classes == expected
    assert [label for _, label in examples.dataset] == numbers  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, ["the table is empty"]),
        (b"text,label\n", {}, ["no rows below it"]),
        (b"texts,gold\na,1\n", {}, ["no column 'text', only ['texts'", "no column 'label'"]),
        (b"a,1\n", {"text": 0, "label": 5}, ["no column 5: there are 2"]),
        (b"a,1\n", {"text": -1, "label": 1}, ["no column -1"]),
        (b"a,1\n", {"text": "text", "label": 1}, ["names for all of them, or numbers"]),
        (b"text,label\na,1\nb\nc,0,x\nd,\n,1\n", {},
         ["line 3: 1 columns, expected 2", "line 4: 3 columns", "line 5: nothing in column 'label'",
          "line 6: nothing in column 'text'"]),
        (b"text,label\n\"x\ny\",1\n\nb,2\nc,3\n", {"classes": ("1", "4")},
         ["line 5: '2' is none of the classes 1, 4", "line 6: '3' is none"]),
        (b"text,label\na,1\nb,2\n", {"classes": ("bad", "good")},
         ["line 3: label 2 is out of range"]),
        (b"text,label\na,1\nb,1\n", {}, ["no more than one class, 1"]),
        (b"text,label\na,1\n", {"classes": ("1", "1")}, ["classes are given twice: 1"]),
        (b"text,label\n\xff\xfe,1\n", {}, ["not text in UTF-8"]),
        (b"text,label\n" + b"a,x\n" * 30, {"classes": ("b", "c")}, ["and 20 more problems"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_reported_with_its_lines(
    content: bytes, options: dict[str, Any], message: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        text_table(path, words, **options)  # type: ignore[arg-type]
    for part in message:
        assert part in str(caught.value)


def test_images_of_a_table_are_as_seen_from_its_folder(tmp_path: Path) -> None:
    class_images(tmp_path / "pictures", one=2)
    far = saved(tmp_path / "elsewhere" / "x.png", seed=5)
    table = tmp_path / "x.csv"
    table.write_text(f"path,label\npictures/one/0.png,no ant\npictures/one/1.png,ant\n{far},ant\n")
    examples = picture_table(table, SMALL)
    assert examples.classes == ("ant", "no ant")
    assert [label for _, label in examples.dataset] == [1, 0, 0]  # type: ignore[attr-defined]
    assert torch.equal(examples.dataset[2][0], SMALL(far))


def test_images_that_are_not_there_are_reported_with_their_lines(tmp_path: Path) -> None:
    saved(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    table = tmp_path / "x.tsv"
    table.write_text("a.png\tx\nb.png\ty\nempty.png\tx\na.png\tz\n")
    with pytest.raises(DataError) as caught:
        picture_table(table, SMALL, 0, 1, classes=["x", "y"])
    for part in ("line 2: there is no image", "b.png", "line 3", "line 4: 'z' is none"):
        assert part in str(caught.value)


# Tensors, and parts


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2), {}, "3 inputs and 2 targets"),
        (torch.zeros(0, 2), torch.zeros(0), {}, "0 inputs"),
        (torch.tensor(1), torch.tensor(1), {}, "0 inputs"),
        (torch.zeros(3, 2), torch.tensor([0, 2, -1]), {"classes": "ab"},
         "(?s)example 1: label 2 .*2 classes.*example 2: label -1"),
        (torch.zeros(2, 2), torch.tensor([[0, -2], [1, 1]]), {}, "example 0: label -2"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    inputs: Any, targets: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tensors(inputs, targets, **options)


def test_arrays_are_tensors_too() -> None:
    examples = tensors(np.zeros((2, 3), "f4"), np.array([0, 1], "u1"), classes=["a", "b"])
    assert examples.classes == ("a", "b")
    assert examples.dataset[1][1].dtype == torch.int64
    assert tensors(np.zeros((2, 3)), np.array([-1.5, 9]), task="regression").task == "regression"


def test_without_a_reader_it_says_which_there_are(tmp_path: Path) -> None:
    folder = class_images(tmp_path, ant=1, bee=1)
    with pytest.raises(DataError, match=r"the reader is None, expected one of gift\.data"):
        class_folders(folder, None)  # type: ignore[arg-type]


def test_lists_of_texts_and_labels_are_read_like_a_table(tmp_path: Path) -> None:
    rows = [("a joy", "good"), ("so deep", "bad"), ("dull", "bad")]
    table = tmp_path / "reviews.tsv"
    table.write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    expected = text_table(table, str.split, text=0, label=1)
    texts, labels = zip(*rows, strict=True)
    found = labelled(texts, labels, str.split)
    assert found.classes == expected.classes
    assert [found.dataset[i] for i in range(3)] == [expected.dataset[i] for i in range(3)]
    with pytest.raises(DataError, match="3 inputs and 2 labels"):
        labelled(texts, labels[:2], str.split)
    with pytest.raises(DataError, match=r"example 1: .*'bad'"):
        labelled(texts, labels, str.split, classes=("good", "awful"))
