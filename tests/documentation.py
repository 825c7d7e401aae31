"""What the code of the documentation needs to run: its blocks, and small files of the names in it.

Blocks of one page run in order, in one namespace and one temporary folder. Comments say what is
not shown: ``<!-- setup`` and code, which runs at its place; ``<!-- no-run: reason -->`` before a
block that is not run; ``<!-- lane: reason -->`` on a page that takes long. A block with a title is
written to the file of that name. In ``sh`` blocks, lines that begin with ``gift`` are run; the
others (pip, make, torchrun) are not.
"""

import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from tests import job_examples, small_files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


class Block(NamedTuple):
    """A block of code, or a silent one.

    Args:
        language: ``python``, ``sh``, ``yaml`` ...
        title: the file that it is the content of; "" for none.
        code: the code.
        line: number of its first line.
        runs: whether it is run.
    """

    language: str
    title: str
    code: str
    line: int
    runs: bool


_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<more>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```\s*$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^ *<!-- no-run: (?P<reason>[^\n]+) -->$",
    re.MULTILINE | re.DOTALL,
)


def pages() -> list[Path]:
    """The documents whose code is run."""
    written = [page for page in DOCS.rglob("*.md") if page.parent.name != "_site"]
    return [ROOT / "README.md", *sorted(written)]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    runs = True
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        if found["reason"]:
            runs = False
        elif found["setup"] is not None:
            yield Block("python", "", found["setup"], line, True)
        else:
            title = re.search(r'title="([^"]+)"', found["more"])
            code = textwrap.dedent(found["code"])
            yield Block(found["language"], title[1] if title else "", code, line, runs)
            runs = True


def run(page: Path, folder: Path, call: Callable[[list[str]], None]) -> int:
    """Run the code of a page in a folder, and return how many blocks there were.

    Args:
        page: the page.
        folder: an empty folder, which is the working directory.
        call: runs the command ``gift`` with arguments.
    """
    text = page.read_text(encoding="utf-8")
    prepare(text, folder)
    namespace: dict[str, Any] = {"__name__": "documentation"}
    number = 0
    for block in blocks(text):
        if not block.runs:
            continue
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code, encoding="utf-8")
        if block.language == "python" and not block.title:
            # Lines are numbered as in the page, which a traceback then shows.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)
            number += 1
        elif block.language == "sh":
            for line in block.code.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["gift"]:
                    call(words[1:])
                    number += 1
    return number


def prepare(text: str, folder: Path) -> None:
    """Write the files that a page names."""
    for name, write in FILES.items():
        if name in text:
            write(folder / name)


def pictures(folder: Path) -> None:
    """A folder of images for each class."""
    small_files.class_images(folder, ants=6, bees=6)


def reviews(file: Path) -> None:
    """A table of texts and labels."""
    rows = [f"a {'good' if n % 2 else 'bad'} film\t{'pos' if n % 2 else 'neg'}" for n in range(12)]
    _write(file, "\n".join(["text\tlabel", *rows, ""]))


def corpus(file: Path) -> None:
    """Plain text."""
    _write(file, "a very good film , a very bad film\n" * 40)


def boxes(file: Path) -> None:
    """Annotations of COCO, with a folder of images beside them."""
    marked = [small_files.box(n, 7 + n % 3, (3, 18)[n % 2], [4, 5, 12, 10]) for n in range(6)]
    folder, written = small_files.coco_files(file.parent / "made", marked)
    written.rename(file)
    folder.rename(file.with_suffix(""))


def masks(folder: Path) -> None:
    """Masks of three classes, beside the images of the same names."""
    for number in range(4):
        pixels = torch.randint(0, 3, (30, 40), dtype=torch.uint8).numpy()
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        small_files.saved(folder.parent / "images" / f"{number}.png", seed=number)


def sounds(folder: Path) -> None:
    """A folder of tones for each class."""
    import soundfile

    for pitch, name in enumerate(("owl", "wren"), start=1):
        for number in range(4):
            file = folder / name / f"{number}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            wave = torch.sin(torch.arange(8000) * 0.1 * pitch + number)
            soundfile.write(file, wave.numpy(), 8000)


def houses(file: Path) -> None:
    """A table of numbers and categories."""
    rows = [
        f"{n},{50 + 7 * n},{(8001, 8002)[n % 2]},{1950 + n},{1000 * n + 90000}" for n in range(40)
    ]
    _write(file, "\n".join(["id,area,postcode,built,price", *rows, ""]))


def qwen(folder: Path) -> None:
    """A language model of Qwen's architecture, with a template for chats."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = small_files.word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [EOS] {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stable_diffusion(folder: Path) -> None:
    """A small pipeline of diffusers."""
    from tests.clients.test_diffusers import pipeline

    folder.mkdir(parents=True)
    pipeline(folder).save_pretrained(folder)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


FILES: dict[str, Callable[[Path], Any]] = {
    "data/train": pictures,
    "data/val": pictures,
    "data/train.tsv": reviews,
    "data/val.tsv": reviews,
    "data/train.txt": corpus,
    "data/val.txt": corpus,
    "street/train.json": boxes,
    "street/val.json": boxes,
    "streets/masks": masks,
    "birds/train": sounds,
    "houses/train.csv": houses,
    "houses/val.csv": houses,
    "garden.jpg": small_files.saved,
    "street.jpg": small_files.saved,
    "bert-base-uncased": job_examples.bert,
    "Qwen/Qwen3-0.6B": qwen,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
}
"""What is written for a page in which a name stands. Models have the names that hubs know them by,
since a folder of that name is taken first."""


@cache
def random_weights(weights: Any, *args: Any, **more: Any) -> dict[str, Any]:
    """In the place of `WeightsEnum.get_state_dict` of torchvision: the same ones in each call."""
    from torchvision.models import get_model, get_model_weights, list_models

    [name, *_] = [one for one in list_models() if get_model_weights(one) is type(weights)]
    options = {"weights_backbone": None} if "fpn" in name else {}
    classes = len(weights.meta["categories"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_model(name, weights=None, num_classes=classes, **options).state_dict()
