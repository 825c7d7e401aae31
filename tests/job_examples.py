"""Tiny examples, networks and jobs as files."""

import random
from pathlib import Path
from typing import Any

import yaml

CHEAP = {"device": "cpu", "progress": False, "tensorboard": False, "batch_size": 4, "epochs": 1}


def images(folder: Path) -> Path:
    """Class folders of small images: warm and cold colours, with other sizes."""
    from PIL import Image

    draw = random.Random(0)
    for part, count in (("train", 6), ("val", 4)):
        for name, (red, blue) in {"cold": (40, 200), "warm": (200, 40)}.items():
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                size = (draw.randint(30, 50), draw.randint(30, 50))
                tone = draw.randint(-40, 40)
                colour = (red + tone, draw.randint(0, 255), blue - tone)
                Image.new("RGB", size, colour).save(place / f"{number}.png")
    return folder


WORDS = ("good", "fine", "great", "bad", "poor", "awful", "film", "plot", "a", "the")


def texts(folder: Path) -> Path:
    """Sentences with their mood, tab-separated, with a header."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 12), ("val", 6)):
        rows = ["text\tlabel"]
        for number in range(count):
            mood = number % 2
            words = [draw.choice(WORDS[:3] if mood else WORDS[3:6]), *draw.choices(WORDS[6:], k=3)]
            rows.append(f"{' '.join(words)}\t{'pleased' if mood else 'cross'}")
        (folder / f"{part}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def bert(folder: Path) -> Path:
    """The folder of a very small BERT with its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["initializer_range"] = 0.5  # so that outputs differ
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(vocabulary), intermediate_size=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def image_job(folder: Path, **parts: Any) -> Path:
    """A job with the smallest network of torchvision, and `images` beside it."""
    images(folder / "data")
    places = {"train": "data/train", "valid": "data/val"}
    job = {
        "network": {"name": "torchvision:shufflenet_v2_x0_5", "weights": None},
        "data": {"kind": "class_folders", "reader": {"size": 32}, **places},
        "strategy": "NormFineTuningStrategy",
        "training": CHEAP,
    }
    return written(folder, job | parts)


def text_job(folder: Path, **parts: Any) -> Path:
    """A job with `bert`, and `texts` beside it."""
    texts(folder / "data")
    bert(folder / "model")
    job = {
        "network": {"name": "transformers:model"},
        "data": {"kind": "text_table", "train": "data/train.tsv", "valid": "data/val.tsv"},
        "strategy": {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}},
        "training": CHEAP,
    }
    return written(folder, job | parts)


def written(folder: Path, job: dict[str, Any]) -> Path:
    """The job as a file in the folder."""
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder / "job.yaml"
