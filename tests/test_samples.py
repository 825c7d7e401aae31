"""What the notebooks learn from, where there is neither a hub nor a folder of data."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from gift.data import PictureReader, class_folders
from gift.demo import samples
from gift.zoo import load_network


@pytest.fixture(autouse=True)
def _nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIFT_DATA", raising=False)
    monkeypatch.setattr(samples, "online", lambda: False)
    monkeypatch.setattr(samples, "_package", lambda name: None)


def test_scans_stand_for_photographs(tmp_path: Path) -> None:
    folder = samples.photographs(tmp_path)
    train, valid = (
        class_folders(folder / part, PictureReader(size=8)) for part in ("train", "val")
    )
    assert train.classes == valid.classes == ("5", "6", "7", "8", "9")
    assert Counter(
        label for _, label in map(train.__getitem__, range(len(train)))
    ) == dict.fromkeys(range(5), 40)


def test_sentences_stand_for_reviews(tmp_path: Path) -> None:
    folder = samples.reviews(tmp_path)
    rows = [
        line.split("\t")
        for name in ("train.tsv", "val.tsv")
        for line in (folder / name).read_text("utf-8").splitlines()
    ]
    assert len({text for text, _ in rows}) == 128
    assert Counter(label for _, label in rows) == {"0": 64, "1": 64}


def test_folders_of_data_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIFT_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "hymenoptera").mkdir(parents=True)
    (tmp_path / "data" / "sst2").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        lines = [f"{name} {n}\t{n % 2}\n" for n in range(400)] + ["x" * 60 + "\t1\n"]
        (tmp_path / "data" / "sst2" / name).write_text("".join(lines), encoding="utf-8")
    assert samples.photographs(tmp_path / "work") == tmp_path / "data" / "hymenoptera"
    folder = samples.reviews(tmp_path / "work")
    for name, given, number in (("train.tsv", "train.tsv", 320), ("val.tsv", "dev.tsv", 160)):
        lines = (folder / name).read_text("utf-8").splitlines()
        assert lines == [f"{given} {n}\t{n % 2}" for n in range(number)]


def test_tones_stand_for_recordings(tmp_path: Path) -> None:
    """Each has the pitch of its class, by its spectrum."""
    folder = samples.recordings(tmp_path)
    files = sorted(folder.glob("*/*/*.wav"))
    assert len(files) == 24
    for file in files:
        wave, rate = soundfile.read(file)
        pitch = np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)
        assert (pitch > 600) == (file.parent.name == "high")


def test_digits_stand_where_masks_say(tmp_path: Path) -> None:
    """Their ink is light, and there are two in each scene."""
    folder = samples.scenes(tmp_path, number=10)
    found = sorted(folder.glob("*/images/*.png"))
    assert [file.parts[-3] for file in found] == ["train"] * 8 + ["val"] * 2
    for file in found:
        image = np.asarray(Image.open(file)).astype(float)
        mask = np.asarray(Image.open(file.parent.parent / "masks" / file.name))
        assert set(np.unique(mask)) == {0, 1}
        assert image.shape == (*mask.shape, 3)
        corners = mask.reshape(2, 48, 2, 48).max(axis=(1, 3))
        assert (corners > 0).sum() == 2
        assert image[mask > 0].mean() > 0.4 * 255


@pytest.mark.parametrize(
    ("make", "options", "inputs"),
    [
        (samples.image_network, {}, {"x": torch.zeros(1, 3, 64, 64)}),
        (samples.text_network, {"num_labels": 2}, {"input_ids": torch.ones(1, 4).long()}),
        (samples.chat_network, {"task": "language"}, {"input_ids": torch.ones(1, 4).long()}),
    ],
)
def test_small_networks_stand_for_trained_ones(
    make: Callable[[Path], str], options: dict[str, int], inputs: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    """They are loaded by name, as those of a hub are, with a reader."""
    loaded = load_network(make(tmp_path), **options)
    assert loaded.reader is not None
    loaded.net.eval()(**inputs)


def test_made_words_are_known_to_the_made_tokenizer(tmp_path: Path) -> None:
    loaded = load_network(samples.text_network(tmp_path), num_labels=2)
    file = samples.reviews(tmp_path) / "train.tsv"
    texts = [line.partition("\t")[0] for line in file.read_text("utf-8").splitlines()]
    tokenizer = loaded.reader.tokenizer
    assert not any(tokenizer.unk_token_id in row for row in tokenizer(texts)["input_ids"])
