"""The steps of the demo, and what it prints."""

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning, merge_strategies
from gift.demo.data import Task
from gift.demo.network import accuracy, fit, predict
from gift.factories import pa_train, pc_any
from gift.strategies import HeadReplacementStrategy, LoRAAllFineTuningStrategy
from gift.utils.info import collect_trainable_parameters, summary, table_info


def lora_and_head(classes: int, rank: int) -> FineTuningStrategy:
    """LoRA on every layer, and a new head."""
    return merge_strategies(
        [HeadReplacementStrategy(classes), LoRAAllFineTuningStrategy(rank=rank)]
    )


def everything(classes: int) -> FineTuningStrategy:
    """A new head, and every other parameter trained directly."""
    return merge_strategies([HeadReplacementStrategy(classes)], para_caps=[(pc_any(), pa_train())])


@dataclass
class Way:
    """One way to fine-tune, and its result.

    Args:
        name: name in the table.
        trainable: number of trained elements.
        before, after: accuracy on held-out images, right after enabling and after training.
        file_bytes: size of the saved ``state_dict()``.
    """

    name: str
    trainable: int
    before: float
    after: float
    seconds: float
    file_bytes: int


@dataclass
class Facts:
    """The facts that the demo prints.

    Args:
        base_accuracy: accuracy of the disabled network on the base's own task, if there is one.
        ways: LoRA with a new head, everything, and the head alone.
        rows: table of trainable parameters, for LoRA with a new head.
        base_bytes: size of the file with the whole base.
        same_output: whether a fresh network with the reloaded delta gave the same output, bit for
            bit.
        same_base: whether the disabled network was equal to the base, bit for bit.
        outputs: outputs of the network with LoRA and a new head, for the held-out images.
        images: the PNG files.
    """

    base_accuracy: float | None = None
    ways: list[Way] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    base_bytes: int = 0
    same_output: bool = False
    same_base: bool = False
    outputs: Tensor | None = None
    images: list[Path] = field(default_factory=list)


@dataclass
class Base:
    """A trained network to start from.

    Args:
        network: the network.
        make: creates an untrained network of the same architecture.
        task: task that it was trained for, if known.
    """

    network: nn.Module
    make: Callable[[], nn.Module]
    task: Task | None = None


def say(text: str = "") -> None:
    """Print without buffering, so that readers see the progress of the demo."""
    print(text, flush=True)


def heading(text: str) -> None:
    """Print the heading of a section."""
    say(f"\n{text}\n{'-' * len(text)}")


def train_base(make: Callable[[], nn.Module], task: Task, steps: int, lr: float) -> Base:
    """Train a base on `task`."""
    torch.manual_seed(0)
    base = Base(make(), make, task)
    start = time.perf_counter()
    fit(base.network, task.train, steps, lr)
    say(
        f"{type(base.network).__name__}, {_size(base.network):,} parameters, learned from "
        f"{len(task.train):,} images in {time.perf_counter() - start:.1f} s.\n"
        f"Of {len(task.test):,} held-out images it tells "
        f"{accuracy(base.network, task.test):.1%} right."
    )
    return base


def fine_tune(base: Base, task: Task, steps: int, lr: float, rank: int, out: Path) -> Facts:
    """Fine-tune `base` to `task` in three ways, and check what gift promises.

    Args:
        base: the network to start from; it is not changed.
        task: task to learn.
        steps: number of training steps, for each way.
        lr: maximum learning rate, for each way.
        rank: rank of LoRA.
        out: folder for the saved states.
    """
    result = Facts()
    classes = len(task.names)
    ways = {
        "LoRA + new head": lora_and_head(classes, rank),
        "everything": everything(classes),
        "new head only": HeadReplacementStrategy(classes),
    }
    _show_code()
    nets = {}
    for name, strategy in ways.items():
        net = nets[name] = copy.deepcopy(base.network)
        torch.manual_seed(0)
        enable_fine_tuning(net, strategy)
        if not result.rows:
            result.rows = _show_trainable(net)
            heading(f"Learning {', '.join(task.names)}: the same loop, data and steps for each way")
            say(f"{len(task.train):,} images to learn from, {len(task.test):,} held out.\n")
        result.ways.append(_train(name, net, task, steps, lr, out))
    _show_ways(result.ways)
    heading("What is kept")
    torch.save(base.network.state_dict(), out / "base.pt")
    result.base_bytes = (out / "base.pt").stat().st_size
    name, strategy = next(iter(ways.items()))
    net = nets[name]
    result.outputs = predict(net, task.test.images)
    fresh = base.make()
    fresh.load_state_dict(torch.load(out / "base.pt"))
    enable_fine_tuning(fresh, strategy)
    fresh.load_state_dict(torch.load(_file(out, name)))
    result.same_output = torch.equal(predict(fresh, task.test.images), result.outputs)
    disable_fine_tuning(net)
    result.same_base = same(net, base.network)
    if base.task is not None:
        result.base_accuracy = accuracy(net, base.task.test)
    _show_kept(result)
    return result


def same(net: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same classes, names, flags and values, bit for bit."""
    mine, theirs = net.state_dict(), other.state_dict()
    return (
        [type(m) for m in net.modules()] == [type(m) for m in other.modules()]
        and [(n, p.requires_grad) for n, p in net.named_parameters()]
        == [(n, p.requires_grad) for n, p in other.named_parameters()]
        and list(mine) == list(theirs)
        and all(torch.equal(mine[key], theirs[key]) for key in mine)
    )


def _train(name: str, net: nn.Module, task: Task, steps: int, lr: float, out: Path) -> Way:
    before = accuracy(net, task.test)
    start = time.perf_counter()
    fit(net, task.train, steps, lr)
    seconds = time.perf_counter() - start
    torch.save(net.state_dict(), _file(out, name))
    trainable = collect_trainable_parameters(net)[1]
    after = accuracy(net, task.test)
    return Way(name, trainable, before, after, seconds, _file(out, name).stat().st_size)


def _file(out: Path, name: str) -> Path:
    return out / f"{name.replace(' + ', '_').replace(' ', '_').lower()}.pt"


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in nn.Module.parameters(net))


def _show_code() -> None:
    heading("One line before a loop that knows nothing of gift")
    say("    enable_fine_tuning(net, lora_and_head(classes, rank))")
    say("    fit(net, data, steps, lr)\n")
    for function in (lora_and_head, fit):
        say("".join(f"    {line}" for line in inspect.getsource(function).splitlines(True)))


def _show_trainable(net: nn.Module) -> list[list[Any]]:
    heading("What is trained: LoRA + new head")
    rows, _ = collect_trainable_parameters(net)
    say(f"{table_info(rows)}\n\n{summary(net)}")
    return rows


def _show_ways(ways: list[Way]) -> None:
    rows = [
        [w.name, f"{w.trainable:,}", f"{w.before:.1%}", f"{w.after:.1%}",
         f"{w.seconds:.1f} s", _kilobytes(w.file_bytes)]
        for w in ways
    ]  # fmt: skip
    header = ["what is trained", "parameters", "right before", "right after", "time", "file"]
    right = ("left", *["right"] * 5)
    say(tabulate(rows, headers=header, colalign=right, disable_numparse=True))


def _show_kept(result: Facts) -> None:
    delta = result.ways[0].file_bytes
    rows = [
        ["file of the delta (its BatchNorm statistics included)", _kilobytes(delta)],
        ["file of the whole network", _kilobytes(result.base_bytes)],
        ["the delta is smaller by", f"{result.base_bytes / delta:.0f} x"],
        ["fresh network, delta reloaded: same output, bit for bit", _yes(result.same_output)],
        ["fine-tuning disabled: base as it was, bit for bit", _yes(result.same_base)],
    ]
    if result.base_accuracy is not None:
        rows.append(["so it still does its own task, right in", f"{result.base_accuracy:.1%}"])
    say(tabulate(rows, tablefmt="plain", colalign=("left", "right"), disable_numparse=True))


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.0f} kB"


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"
