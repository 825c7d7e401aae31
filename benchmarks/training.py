"""The loop of gift beside a loop written by hand, Lightning and the Trainer of transformers.

Two tasks of ``quality.py``, with real data and pretrained networks: ResNet20 learns ants and bees,
MiniLM the sentiment of SST-2. All four loops get the same enabled network (LoRA and the task's
linear layer), seed, batches in the same order, AdamW without weight decay, linear warm-up over a
tenth of the steps and linear decay; none clips, validates or keeps the best epoch. Accuracy is that
on the whole test data; the largest difference of any trained value from that of the loop by hand is
told, too.

What a loop costs is the time of the processor (so that other work on the machine counts little)
from one batch to the next, as the function sees it that makes the batches and that all loops share:
on a network so small that hardly anything else is measured, and on both tasks. Loops take turns; a
turn has the median over its steps, what is printed is the median over the turns; ratios are taken
within a turn.

Predicted before the first run:

* Accuracies differ by less than their spread over the seeds. ResNet20 has no dropout, so its loops
  differ by rounding only, which may turn an example or two of 153.
* On the small network gift costs at most 0.3 ms a step more than the loop by hand, most of it for
  the norm of the gradient and for reading the loss; with files at most 0.3 ms more; Lightning and
  the Trainer cost more than gift without files.
* On the tasks gift is within 5 % of the loop by hand.

Results are stored in ``results/training.json`` and ``.md`` after each task.

    python benchmarks/training.py [--data FOLDER] [--tasks ...] [--seeds 3] [--rounds 5]
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import lightning
import torch
import torch.nn.functional as F
import transformers
from _common import machine, write_results
from _quality_tasks import Data, Task, tasks_that_are_there
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from gift import FineTuningStrategy, enable_fine_tuning
from gift.data.examples import Examples
from gift.factories import ma_train, mc_path
from gift.strategies import LoRAAllFineTuningStrategy, merge_strategies
from gift.training import finetune

RESULTS = Path(__file__).parent / "results"
WARMUP = 0.1
RATES = {"ants_bees": 3e-3, "sst2": 1e-3}
EPOCHS = {"ants_bees": 5, "sst2": 2}
RANKS = {"ants_bees": 2, "sst2": 8}


@dataclass
class Work:
    """What all loops are given.

    Args:
        network: enabled; each loop trains a copy.
        pairs: examples of input and label.
        batch: examples in each step.
        epochs: passes.
        rate: learning rate at its highest.
        seed: of the order and of dropout.
        marks: when each batch was made, in time of the processor.
    """

    network: nn.Module
    pairs: list[tuple[Tensor, int]]
    batch: int
    epochs: int
    rate: float
    seed: int
    marks: list[float]

    @property
    def steps(self) -> int:
        """Of the optimizer, in all epochs."""
        return -(-len(self.pairs) // self.batch) * self.epochs

    def collate(self, items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """A batch, and a note of when it was made."""
        self.marks.append(time.process_time())
        inputs, labels = zip(*items, strict=True)
        return pad_sequence(inputs, batch_first=True), torch.tensor(labels)

    def loader(self) -> DataLoader[Any]:
        """The batches in their order; global random numbers play no part."""
        order, own = Order(len(self.pairs), self.batch, self.seed), torch.Generator()
        pairs: Any = self.pairs
        return DataLoader(pairs, batch_sampler=order, collate_fn=self.collate, generator=own)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Of what is trained."""
        return torch.optim.AdamW(network.parameters(), lr=self.rate, weight_decay=0)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Warm-up and decay."""
        return LambdaLR(optimizer, partial(factor, round(self.steps * WARMUP), self.steps))

    def seconds(self) -> float:
        """From one batch to the next, without the first ones."""
        skip = min(10, len(self.marks) // 4)
        times = self.marks[skip:]
        return median(b - a for a, b in pairwise(times))


def factor(warmup: int, steps: int, step: int) -> float:
    """Of the learning rate."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1 - (step - warmup) / max(1, steps - warmup)


class Order:
    """Places of the examples in each batch, another order in each epoch."""

    def __init__(self, number: int, batch: int, seed: int) -> None:
        self.number, self.batch_size, self.seed = number, batch, seed
        self.drop_last = False

    def __len__(self) -> int:
        return -(-self.number // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        for places in torch.randperm(self.number, generator=generator).split(self.batch_size):
            yield places.tolist()


def by_hand(work: Work, network: nn.Module) -> None:
    """As short as it can be."""
    torch.manual_seed(work.seed)
    loader, optimizer = work.loader(), work.optimizer(network)
    schedule = work.schedule(optimizer)
    network.train()
    for _ in range(work.epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
            schedule.step()


def by_gift(work: Work, network: nn.Module, folder: str | None = None) -> None:
    """`gift.training.finetune`; with a folder, everything that it writes while it trains."""
    pairs: Any = work.pairs
    finetune(
        network, Examples(pairs, collate=work.collate), folder=folder, epochs=work.epochs,
        batch_size=work.batch, lr=work.rate, weight_decay=0.0, lr_schedule="linear",
        warmup=WARMUP, clip=None, device="cpu", keep="last", seed=work.seed, progress=False,
    )  # fmt: skip


def by_gift_with_files(work: Work, network: nn.Module) -> None:
    """With checkpoints, logs and a report."""
    with tempfile.TemporaryDirectory() as folder:
        by_gift(work, network, folder)


class Lit(lightning.LightningModule):
    """The network for Lightning."""

    def __init__(self, work: Work, network: nn.Module) -> None:
        super().__init__()
        self.work, self.network = work, network

    def training_step(self, batch: Any, number: int) -> Tensor:
        """The loss."""
        inputs, labels = batch
        return F.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> Any:
        """Those of all loops."""
        optimizer = self.work.optimizer(self.network)
        rates = {"scheduler": self.work.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": rates}


def by_lightning(work: Work, network: nn.Module) -> None:
    """Without logs, checkpoints and bars."""
    torch.manual_seed(work.seed)
    trainer = lightning.Trainer(
        max_epochs=work.epochs, accelerator="cpu", devices=1, logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Lit(work, network.train()), work.loader())


class HandedTrainer(transformers.Trainer):
    """The Trainer with the loader and loss of all loops."""

    work: Work

    def get_train_dataloader(self) -> Any:
        """The batches of all loops."""
        return self.work.loader()

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """The loss of all loops."""
        return F.cross_entropy(model(inputs[0]), inputs[1])


def by_trainer(work: Work, network: nn.Module) -> None:
    """Without logs, checkpoints and bars."""
    optimizer = work.optimizer(network)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=work.epochs, per_device_train_batch_size=work.batch,
            max_grad_norm=0.0, save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, seed=work.seed, remove_unused_columns=False,
        )  # fmt: skip
        pairs: Any = work.pairs
        both = (optimizer, work.schedule(optimizer))
        trainer = HandedTrainer(network, arguments, train_dataset=pairs, optimizers=both)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.work = work
        trainer.train()


Loop = Callable[[Work, nn.Module], None]
LOOPS: dict[str, Loop] = {
    "by hand": by_hand,
    "gift": by_gift,
    "gift, with files": by_gift_with_files,
    "Lightning": by_lightning,
    "transformers": by_trainer,
}


def work_of(key: str, task: Task, seed: int) -> Work:
    """What the loops are given on a task."""
    torch.manual_seed(seed)
    network = task.fresh()
    head = FineTuningStrategy([(mc_path("linear"), ma_train()), *task.caps])
    lora = LoRAAllFineTuningStrategy(rank=RANKS[key])
    enable_fine_tuning(network, merge_strategies([head, lora]))
    return Work(network, pairs(task.train), task.batch, EPOCHS[key], RATES[key], seed, [])


def pairs(data: Data) -> list[tuple[Tensor, int]]:
    return list(zip(data.inputs, data.labels.tolist(), strict=True))


def small_work() -> Work:
    """So small that a step is hardly more than its loop."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    enable_fine_tuning(network, LoRAAllFineTuningStrategy(rank=1))
    inputs = torch.randn(1600, 16)
    data = Data(list(inputs), (inputs[:, 0] > 0).long())
    return Work(network, pairs(data), 8, 1, 1e-3, 0, [])


def trained(loop: Loop, work: Work) -> tuple[nn.Module, float]:
    """The network after its training, and the seconds from batch to batch."""
    own, network = replace(work, marks=[]), deepcopy(work.network)
    loop(own, network)
    if len(own.marks) < own.steps:
        raise RuntimeError(f"{len(own.marks)} batches were made for {own.steps} steps")
    return network.eval(), own.seconds()


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest of any trained value."""
    values = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in values)


def accuracies(key: str, task: Task, seeds: int) -> dict[str, dict[str, list[float]]]:
    """For each loop, accuracies and differences by seed."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"accuracies": [], "differences": []} for name in LOOPS
    }
    for seed in range(seeds):
        work = work_of(key, task, seed)
        networks = {name: trained(loop, work)[0] for name, loop in LOOPS.items()}
        for name, network in networks.items():
            found[name]["accuracies"].append(task.judge(network)[0])
            found[name]["differences"].append(difference(network, networks["by hand"]))
    return found


def costs(work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """For each loop, the median time of a step, and its ratio to that of the loop by hand."""
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(rounds + 1):
        for name, loop in LOOPS.items():
            took = trained(loop, work)[1]
            if turn:  # the first round does not count
                seconds[name].append(took)
    bare = seconds["by hand"]
    return {
        name: {
            "step_ms": median(times) * 1e3,
            "more_than_by_hand_ms": median(a - b for a, b in zip(times, bare, strict=True)) * 1e3,
            "over_by_hand": median(a / b for a, b in zip(times, bare, strict=True)),
        }
        for name, times in seconds.items()
    }


HEADER = ["loop", "accuracy %", "+-", "from by hand", "step ms", "more ms", "step / by hand"]


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for name, cost in found["costs"].items():
        runs = found.get("accuracies", {}).get(name)
        row = [name, "", "", ""]
        if runs:
            values = runs["accuracies"]
            spread = stdev(values) if len(values) > 1 else 0.0
            row = [name, f"{mean(values):.1f}", f"{spread:.1f}", f"{max(runs['differences']):.1g}"]
        more = cost["more_than_by_hand_ms"]
        row += [f"{cost['step_ms']:.2f}", f"{more:+.2f}", f"{cost['over_by_hand']:.2f}"]
        rows.append([text for text, use in zip(row, columns(found), strict=True) if use])
    header = [text for text, use in zip(HEADER, columns(found), strict=True) if use]
    aligned = ["left"] + ["right"] * (len(header) - 1)
    made = tabulate(rows, header, "pipe", disable_numparse=True, colalign=aligned)
    return f"## {found['title']}\n\n{made}\n"


def columns(found: dict[str, Any]) -> list[bool]:
    """Which columns there are; the small network learns nothing."""
    return [True] + [bool(found.get("accuracies"))] * 3 + [True] * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of data and weights (or GIFT_DATA)")
    parser.add_argument("--tasks", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json")
    args = parser.parse_args()
    quiet()
    result = {"title": "Two linear layers", "costs": costs(small_work(), args.rounds)}
    store(args.out, "small", result)
    for key, task in tasks_that_are_there(parser, args.tasks, args.data):
        work = replace(work_of(key, task, 0), epochs=1)
        result = {
            "title": task.title,
            "settings": {"epochs": EPOCHS[key], "batch": task.batch, "rate": RATES[key]},
            "examples": len(task.train.labels),
            "accuracies": accuracies(key, task, args.seeds),
            "costs": costs(replace(work, pairs=work.pairs[: 24 * work.batch]), args.rounds),
        }
        store(args.out, key, result)


def store(file: Path, key: str, result: dict[str, Any]) -> None:
    """Print a result, and add it to those that are in the file by now."""
    print(table(result), flush=True)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"tasks": {}}
    results["machine"] = machine() | {"lightning": lightning.__version__}
    results["tasks"][key] = result
    write_results(file, results)
    parts = "\n".join(map(table, results["tasks"].values()))
    file.with_suffix(".md").write_text(f"# Training\n\n{parts}", encoding="utf-8")


def quiet() -> None:
    """One thread, and no advice from the contenders."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    main()
