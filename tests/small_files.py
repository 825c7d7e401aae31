"""Tiny data sets in the formats of real ones, written as their makers did."""

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "good", "bad", "film", ",", "very"]


def image(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, scaled up so that neighbours are alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(path: Path, **options: Any) -> Path:
    """The file of such an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image(**options).save(path)
    return path


def class_images(folder: Path, **counts: int) -> Path:
    """A folder for each class, with so many images."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            saved(folder / name / f"{i}.png", seed=10 * number + i)
    return folder


def word_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """A number for each word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]"} if pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[EOS]", unk_token="[UNK]", model_max_length=64, **special
    )


def mnist(root: Path, labels: list[int]) -> np.ndarray:
    """Big-endian IDX files of grey images, as LeCun's; gives the pixels of both parts."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "images-idx3-ubyte": struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes(),
        "labels-idx1-ubyte": struct.pack(">2i", 2049, len(labels)) + bytes(labels),
    }
    for name, data in files.items():
        (folder / f"train-{name}").write_bytes(data)
        (folder / f"t10k-{name}").write_bytes(data)
    return pixels


def cifar10(root: Path, labels: list[int], monkeypatch: Any) -> np.ndarray:
    """Pickled batches of rows of 3072 bytes, as Krizhevsky's; gives the pixels.

    torchvision knows the real files by their digests; here it must know these.
    """
    from torchvision.datasets import CIFAR10

    rows = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    files = {
        "data_batch_1": {"data": rows, "labels": labels},
        "test_batch": {"data": rows, "labels": labels},
        "batches.meta": {"label_names": names},
    }
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    digests = {}
    for name, content in files.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        digests[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", digests["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    meta = {**CIFAR10.meta, "md5": digests["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return rows.reshape(-1, 3, 32, 32)


def imagenet(root: Path) -> None:
    """Folders of WordNet numbers, and the names that torchvision takes from the development kit."""
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    root.mkdir(parents=True, exist_ok=True)
    torch.save((names, ["n01440764"]), root / "meta.bin")
    for split in ("train", "val"):
        for number, name in enumerate(names):
            saved(root / split / name / f"{name}_1.JPEG", seed=number)


def box(number: int, image: int, category: int, bbox: Any, **more: Any) -> dict[str, Any]:
    """An annotation of COCO."""
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox} | more


def coco_files(folder: Path, boxes: list[dict[str, Any]], images: int = 3) -> tuple[Path, Path]:
    """Images of 40 x 30, and instances as COCO has them: category numbers with gaps."""
    for number in range(images):
        saved(folder / "pictures" / f"{number:012}.png", seed=number)
    content = {
        "images": [
            {"id": 7 + i, "file_name": f"{i:012}.png", "width": 40, "height": 30}
            for i in range(images)
        ],
        "categories": [{"id": i, "name": n} for i, n in ((90, "dog"), (3, "car"), (18, "cat"))],
        "annotations": boxes,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return folder / "pictures", path
