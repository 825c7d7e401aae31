"""How well each method learns, on real data, at a similar budget, and what it costs and forgets.

Three tasks: a ResNet20 that was trained on CIFAR-10 learns ants and bees, and CIFAR-10 after a JPEG
compression that costs it ten points; MiniLM, a text encoder that was trained for the similarity of
sentences, learns the sentiment of SST-2. Data and weights are real; see ``--data``.

Protocol, the same for all contenders:

* AdamW, no weight decay, linear warm-up over a tenth of the steps, then linear decay. The task's
  linear layer is trained in every contender, at the task's own rate. Word embeddings are trained by
  full fine-tuning only.
* Networks train in evaluation mode: no dropout, and running statistics stand still, so that a
  contender changes what it says and nothing else.
* A fifth of the training data is held out to choose the learning rate, once for each task: on
  seed 0, of a rate, a third of it and three times as much, the one with the least held-out loss.
  Where that is at an edge, the next rate is tried as well.
* Accuracy is that on the whole test data, mean and standard deviation over the seeds, which choose
  the new head, the delta and the order of the examples.
* "Source" is how much is left of what the network could do before, with the delta on and after
  `disable_fine_tuning`; the script stops if the latter is not exactly what it was at the start.
  Ants and bees: accuracy on CIFAR-10 of the adapted network with the original head. JPEG: the same
  images, since the original ones are not part of the data. SST-2: of the 10 nearest neighbours
  (by cosine) of each sentence among the test sentences, the share that stays.
* A step (forward, backward, AdamW) is timed in turns with one of full fine-tuning; the median of
  the ratios is given. Memory is what one training step keeps for its backward pass, in bytes: all
  storages that autograd saves, without parameters and buffers. That is exact, a process's peak is
  not.

Results are stored in ``results/quality.json`` after each contender, so that a stopped run goes on
where it was, and only what has other settings is measured again. ``results/quality.png`` is drawn
from them.

    python benchmarks/quality.py [--data FOLDER] [--tasks ...] [--only ...] [--seeds 3]
        [--fresh | --costs] [--out FILE]
"""

import argparse
import json
import math
import time
from collections import Counter
from itertools import chain, count, islice
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _common import machine, write_results
from _quality_tasks import TASKS, Task, tasks_that_are_there
from tabulate import tabulate
from torch import Tensor, nn

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning, strategies
from gift.factories import ma_train, mc_path

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5  # of timed steps
FACTOR, MOST_RATES = 3, 4  # between learning rates that are tried, and how many at most


class Contender(NamedTuple):
    """A way to fine-tune.

    Args:
        strategy: name of a strategy, without ``FineTuningStrategy``; empty for the head alone.
        resnet20: the learning rate that is tried first, and settings for that network, to train
            about 3 % of it, where the method can.
        minilm: the same for the other one, about 1.5 %. Virtual tokens have the size that they have
            in use: P-tuning reaches 1.5 % by its encoder, prompt tuning has 0.03 %.

    A contender that a network has no place for cannot take part: its row has the reason that gift
    gives. Visual prompts are for vision transformers, prefix tuning for models with a cache.
    """

    strategy: str
    resnet20: tuple[float, dict[str, Any]]
    minilm: tuple[float, dict[str, Any]]


UNSTRIDED = ["layer1.*", "layer[23].[12]"]  # blocks whose output has the shape of their input

CONTENDERS = {
    "full": Contender("Full", (3e-4, {}), (1e-4, {})),
    "head only": Contender("", (1e-2, {}), (3e-2, {})),
    "LoRA": Contender("LoRAAll", (3e-3, {"rank": 2}), (3e-3, {"rank": 8})),
    "rsLoRA": Contender("RsLoRAAll", (3e-3, {"rank": 2}), (3e-3, {"rank": 8})),
    "DoRA": Contender("DoRAAll", (3e-3, {"rank": 1}), (3e-3, {"rank": 8})),
    "PiSSA": Contender("PiSSAAll", (1e-3, {"rank": 2}), (1e-3, {"rank": 8})),
    "OLoRA": Contender("OLoRAAll", (1e-3, {"rank": 2}), (1e-3, {"rank": 8})),
    "LoRA-FA": Contender("LoRAFAAll", (3e-3, {"rank": 4}), (3e-3, {"rank": 16})),
    "VeRA": Contender("VeRAAll", (3e-2, {"rank": 256}), (3e-2, {"rank": 256})),
    "LoHa": Contender(
        "LoHaAll", (1e-2, {"rank": 1, "conv_layout": "balanced"}), (3e-3, {"rank": 4})
    ),
    "LoKr": Contender(
        "LoKrAll", (3e-3, {"full_matrix": True}), (3e-3, {"full_matrix": True, "factor": 6})
    ),
    "IA3": Contender("IA3All", (1e-2, {}), (1e-2, {})),
    "SVDiff": Contender("SVDiffAll", (1e-2, {}), (1e-2, {})),
    "OFT": Contender("OFTAll", (1e-3, {"block_size": 3}), (1e-3, {"block_size": 32})),
    "HRA": Contender("HRAAll", (1e-3, {"rank": 2}), (1e-3, {"rank": 16})),
    "FourierFT": Contender(
        "FourierFTAll", (3e-3, {"n_frequency": 400}), (3e-2, {"n_frequency": 9200})
    ),
    "SHiRA": Contender("SHiRAAll", (3e-3, {"rank": 2}), (3e-3, {"rank": 8})),
    "AdaLoRA": Contender("AdaLoRAAll", (3e-3, {"rank": 1}), (3e-3, {"rank": 8})),
    "DeLoRA": Contender(  # the default length of a delta, 15, is that of large language models
        "DeLoRAAll",
        (3e-3, {"rank": 1, "delora_lambda": 1.0}),
        (3e-3, {"rank": 8, "delora_lambda": 1.0}),
    ),
    "GraLoRA": Contender("GraLoRAAll", (3e-3, {"rank": 2}), (3e-3, {"rank": 8})),
    "HiRA": Contender("HiRAAll", (3e-3, {"rank": 1}), (3e-3, {"rank": 8})),
    "MiSS": Contender("MiSSAll", (3e-3, {"rank": 12}), (3e-3, {"rank": 16})),
    "DEFT": Contender("DEFTAll", (3e-3, {"rank": 1}), (3e-3, {"rank": 8})),
    "LoRA-XS": Contender("LoRAXSAll", (3e-3, {"rank": 20}), (3e-3, {"rank": 96})),
    "PSOFT": Contender("PSOFTAll", (3e-3, {"rank": 27}), (3e-3, {"rank": 128})),
    "RandLoRA": Contender("RandLoRAAll", (1e-2, {"rank": 4}), (1e-2, {"rank": 16})),
    "GLoRA": Contender("GLoRAAll", (3e-3, {"rank": 1}), (3e-3, {"rank": 3})),
    "FacT": Contender("FacTAll", (3e-3, {"rank": 8}), (3e-3, {"rank": 56})),
    "TinyLoRA": Contender("TinyLoRAAll", (1e-2, {}), (1e-2, {})),
    "VB-LoRA": Contender(
        "VBLoRAAll",
        (1e-2, {"rank": 2, "num_vectors": 16, "vector_length": 32}),
        (1e-2, {"rank": 6, "vector_length": 64}),
    ),
    "Uni-LoRA": Contender(
        "UniLoRAAll",
        (1e-2, {"rank": 4, "theta_d_length": 8000}),
        (1e-2, {"rank": 16, "theta_d_length": 330_000}),
    ),
    "BOFT": Contender("BOFTAll", (1e-3, {"block_size": 2}), (1e-3, {"block_size": 16})),
    "C3A": Contender("C3AAll", (3e-3, {}), (3e-3, {})),
    "RoAd": Contender("RoAdAll", (1e-2, {}), (1e-2, {})),
    "SSF": Contender("SSFAll", (1e-2, {}), (1e-2, {})),
    "WaveFT": Contender("WaveFTAll", (3e-3, {"n_frequency": 400}), (1e-3, {"n_frequency": 9200})),
    "bottleneck": Contender("Bottleneck", (3e-3, {"size": 10}), (3e-3, {"size": 72})),
    "bottleneck beside": Contender(
        "Bottleneck",
        (3e-3, {"size": 12, "parallel": True, "after": UNSTRIDED}),
        (3e-3, {"size": 72, "parallel": True}),
    ),
    "BitFit": Contender("BitFit", (3e-3, {}), (3e-3, {})),
    "norms": Contender("Norm", (3e-3, {}), (3e-3, {})),
    "LoReFT": Contender("LoReFT", (3e-3, {}), (3e-3, {"rank": 72})),
    "deep visual prompts": Contender(
        "VisualPrompt",
        (1e-2, {"deep": True, "blocks": "layer3"}),
        (1e-2, {"deep": True, "at": "encoder"}),
    ),
    "prompt": Contender("Prompt", (1e-2, {}), (1e-2, {"at": "encoder", "num_virtual_tokens": 16})),
    "P-tuning": Contender(
        "PTuning",
        (3e-3, {}),
        (3e-3, {"at": "encoder", "num_virtual_tokens": 16, "encoder_size": 312}),
    ),
    "prefix": Contender("Prefix", (3e-3, {}), (3e-3, {"at": "encoder", "num_virtual_tokens": 16})),
}


def strategy_of(name: str, task: Task) -> FineTuningStrategy:
    """The strategy of a contender, with the head that all contenders train."""
    make = getattr(strategies, CONTENDERS[name].strategy + "FineTuningStrategy")
    _, settings = getattr(CONTENDERS[name], task.family)
    if name == "full":
        return make(**settings)
    head = FineTuningStrategy([(mc_path("linear"), ma_train()), *task.caps])
    return strategies.merge_strategies([head, make(**settings)])


def prepared(name: str, task: Task, seed: int) -> nn.Module:
    """A fresh network that is about to be trained."""
    torch.manual_seed(seed)
    network = task.fresh()
    report = enable_fine_tuning(network, strategy_of(name, task))
    if report.unmatched:
        raise ValueError(f"there is nothing for {report.unmatched}")
    return network


def optimizer_of(network: nn.Module, task: Task, rate: float) -> torch.optim.Optimizer:
    """The head at its own rate, unless nothing else is trained."""
    head = list(network.linear.parameters())
    delta = [p for p in network.parameters() if all(p is not h for h in head)]
    groups = [{"params": head, "lr": task.head_rate if delta else rate}, {"params": delta}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0)


def trained(name: str, task: Task, rate: float, seed: int) -> nn.Module:
    """The network after its training."""
    network = prepared(name, task, seed)
    optimizer = optimizer_of(network, task, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * (step + 1) / task.steps) * (1 - step / task.steps)
    )
    epochs = (task.train.batches(task.batch, shuffled=True) for _ in count())
    for inputs, labels, _ in islice(chain.from_iterable(epochs), task.steps):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    return network


def by_rate(name: str, task: Task) -> tuple[dict[float, float], dict[float, nn.Module]]:
    """For each learning rate that is tried, the loss on the held-out examples, and the network."""
    first, _ = getattr(CONTENDERS[name], task.family)
    losses, networks = {}, {}
    rates = [first / FACTOR, first, first * FACTOR]
    while rates:
        rate = rates.pop(0)
        networks[rate] = trained(name, task, rate, seed=0)
        outputs = task.held_out.through(networks[rate])
        loss = F.cross_entropy(outputs, task.held_out.labels).item()
        losses[rate] = loss if math.isfinite(loss) else math.inf
        if not rates and len(losses) < MOST_RATES:
            best = min(losses, key=losses.__getitem__)
            rates += [best / FACTOR] if best == min(losses) else []
            rates += [best * FACTOR] if best == max(losses) else []
    return losses, networks


def source_when_off(name: str, task: Task, network: nn.Module) -> float:
    """What a trained network can do of its source task once its delta is off."""
    disable_fine_tuning(network)
    off = task.judge(network)[1]
    if off != task.start:
        raise RuntimeError(f"{name}: source {off} with the delta off, {task.start} at the start")
    return off


def bytes_for_backward(network: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    """What the forward pass of one training step keeps for its backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*named(network), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(network(inputs), labels)  # holds what is kept
    size = sum(size for place, size in kept.items() if place not in own)
    del loss
    return size


def named(network: nn.Module) -> list[nn.Parameter]:
    """All parameters; ``parameters()`` has the trained ones only."""
    return [parameter for _, parameter in network.named_parameters()]


def costs(name: str, task: Task) -> dict[str, float]:
    """Memory and time of a training step."""
    batches = list(task.train.batches(task.batch))
    inputs, labels, _ = batches[len(batches) // 2]
    networks = {who: prepared(who, task, seed=0) for who in {name: 0, "full": 0}}
    kept = bytes_for_backward(networks[name], inputs, labels)
    optimizers = {who: optimizer_of(net, task, 1e-6) for who, net in networks.items()}
    seconds: dict[str, list[float]] = {who: [] for who in networks}
    for _ in range(ROUNDS + 1):
        for who, network in networks.items():
            start = time.process_time()
            optimizers[who].zero_grad()
            F.cross_entropy(network(inputs), labels).backward()
            optimizers[who].step()
            seconds[who].append(time.process_time() - start)
    pairs = list(zip(seconds[name], seconds["full"], strict=True))[1:]
    return {
        "bytes_for_backward": kept,
        "step_s": median(mine for mine, _ in pairs),
        "step_over_full": median(mine / full for mine, full in pairs),
    }


def size_of(delta: dict[str, Tensor]) -> int:
    """Bytes of a delta in a file, which has tensors that layers share once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in delta.values()}.values())


def measure(name: str, task: Task, seeds: int) -> dict[str, Any]:
    """Everything about a contender on a task; or the reason why it cannot take part."""
    start = time.perf_counter()
    try:
        network = prepared(name, task, seed=0)
        task.held_out.part(range(2)).through(network)  # some networks show at a call what they are
    except ValueError as error:
        return {"reason": str(error).splitlines()[-1].strip()}
    parameters = list(network.parameters())
    losses, networks = by_rate(name, task)
    rate = min(losses, key=losses.__getitem__)
    chosen = networks[rate]
    delta = chosen.state_dict()
    rest = (trained(name, task, rate, seed) for seed in range(1, seeds))
    accuracies, sources = zip(*map(task.judge, chain([chosen], rest)), strict=True)
    trainable = sum(p.numel() for p in parameters)
    return {
        "rate": rate,
        "held_out_loss_by_rate": {f"{rate:.2g}": loss for rate, loss in sorted(losses.items())},
        "parameters": trainable,
        "share": trainable / sum(p.numel() for p in task.fresh().parameters()),
        "delta_bytes": size_of(delta),
        "accuracies": accuracies,
        "sources_on": sources,
        "source_off": source_when_off(name, task, chosen),
        **costs(name, task),
        "total_s": time.perf_counter() - start,
    }


def settings_of(name: str, task: Task, seeds: int) -> dict[str, Any]:
    """What a stored result must agree with, else it is measured again."""
    contender = CONTENDERS[name]
    return {
        "strategy": contender.strategy,
        "settings": list(getattr(contender, task.family)),
        "task": [task.steps, task.batch, task.head_rate, len(task.train.labels)],
        "seeds": seeds,
    }


def stored(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"tasks": {}}


def store(file: Path, key: str, task: Task, name: str, result: dict[str, Any]) -> None:
    """Add a result to those that are in the file by now."""
    results = stored(file)
    results["machine"] = machine()
    of_task = results["tasks"].setdefault(key, {"contenders": {}})
    of_task |= {"title": task.title, "source": task.source, "source_at_start": task.start}
    of_task["contenders"][name] = result
    write_results(file, results)


def in_order(contenders: dict[str, Any]) -> dict[str, Any]:
    return {name: contenders[name] for name in CONTENDERS if name in contenders}


HEADER = {
    "contender": "",
    "parameters": ",",
    "% of all": ".2f",
    "delta kB": ",.0f",
    "rate": ".1g",
    "accuracy %": ".1f",
    "+-": ".1f",
    "source on %": ".1f",
    "source off %": ".2f",
    "step / full": ".2f",
    "kept for backward MB": ".1f",
}


def spread(result: dict[str, Any]) -> float:
    """The standard deviation of the accuracy over the seeds."""
    return stdev(result["accuracies"]) if len(result["accuracies"]) > 1 else 0.0


def table(task: dict[str, Any]) -> str:
    """The results of one task."""
    rows, reasons = [], []
    for name, it in in_order(task["contenders"]).items():
        if "reason" in it:
            rows.append([name] + ["-"] * (len(HEADER) - 1))
            reasons.append(f"{name} cannot take part: {it['reason']}")
            continue
        values = [name, it["parameters"], it["share"] * 100, it["delta_bytes"] / 1e3, it["rate"]]
        values += [mean(it["accuracies"]), spread(it), mean(it["sources_on"]), it["source_off"]]
        values += [it["step_over_full"], it["bytes_for_backward"] / 1e6]
        rows.append([format(v, f) for v, f in zip(values, HEADER.values(), strict=True)])
    title = f"{task['title']}; source: {task['source']}, {task['source_at_start']:.2f} at the start"
    aligned = ["left"] + ["right"] * (len(HEADER) - 1)
    made = tabulate(rows, headers=list(HEADER), disable_numparse=True, colalign=aligned)
    return "\n".join([title, "", made, *reasons])


LINES = {"full": "black", "head only": "dimgray"}
COSTS = {  # what it is, its unit, the scale of the axis, and how far apart equal costs stand
    "parameters": ("trained parameters, head included", 1, "log", 1.05),
    "bytes_for_backward": ("kept for the backward pass of a step, MB", 1e6, "linear", 1),
}


def draw(results: dict[str, Any], file: Path) -> None:
    """Accuracy against trained parameters and against memory, a row of panels for each task.

    A line joins the front: the contenders that none beats at the same cost or less.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    tasks = [results["tasks"][key] for key in TASKS if key in results["tasks"]]
    figure = Figure((14, 4.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(COSTS), squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        shown = {n: it for n, it in in_order(task["contenders"]).items() if "reason" not in it}
        methods = {name: it for name, it in shown.items() if name not in LINES}
        for axes, (cost, (title, unit, scale, apart)) in zip(row, COSTS.items(), strict=True):
            points = places({name: it[cost] / unit for name, it in methods.items()}, methods, apart)
            for name, (across, height) in points.items():
                axes.errorbar(across, height, spread(shown[name]), fmt="o", color=colour(name),
                              markersize=5, capsize=2, linewidth=1)  # fmt: skip
            best = front(methods, cost)
            axes.plot(*zip(*(points[name] for name in best), strict=True), color="crimson",
                      drawstyle="steps-post", linewidth=1, alpha=0.7)  # fmt: skip
            axes.set(title=task["title"], ylabel="test accuracy, %", xscale=scale, xlabel=title)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            axes.margins(x=0.15, y=0.12)
            for name in LINES.keys() & shown.keys():
                height = mean(shown[name]["accuracies"])
                axes.axhline(height, color=LINES[name], linestyle="--", linewidth=1)
                axes.text(0.01, height, f"{name} ({shown[name][cost] / unit:,.0f})",
                          transform=axes.get_yaxis_transform(), va="bottom", color=LINES[name],
                          fontsize=8, bbox={"color": "white", "alpha": 0.7, "pad": 1})  # fmt: skip
            label(axes, points, best)
    figure.savefig(file, dpi=110)


def colour(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](list(CONTENDERS).index(name) % 20)


def places(
    costs: dict[str, float], shown: dict[str, Any], apart: float
) -> dict[str, tuple[float, float]]:
    """Where each point stands; equal costs stand side by side, each this factor from the last."""
    beside: Counter[float] = Counter()
    points = {}
    for name, cost in costs.items():
        points[name] = (cost * apart ** beside[cost], mean(shown[name]["accuracies"]))
        beside[cost] += 1
    return points


def front(shown: dict[str, Any], cost: str) -> list[str]:
    """The contenders that are better than all that cost no more, in the order of their costs."""
    accuracy = {name: mean(it["accuracies"]) for name, it in shown.items()}
    found: list[str] = []
    for name in sorted(shown, key=lambda name: (shown[name][cost], -accuracy[name])):
        if not found or accuracy[name] > accuracy[found[-1]]:
            found.append(name)
    return found


def label(axes: Any, points: dict[str, tuple[float, float]], best: list[str]) -> None:
    """Names to the right of the panel, in the order of their points; the front is bold."""
    bottom, top = axes.get_ylim()  # which settles them
    names = sorted(points, key=lambda name: points[name][1])
    gap = 1 / max(len(names), 18)
    height = -math.inf
    for number, name in enumerate(names):
        own = (points[name][1] - bottom) / (top - bottom)
        height = min(max(own, height + gap), 1 - gap * (len(names) - 1 - number))
        axes.annotate(name, points[name], (1.03, height), "data", "axes fraction",
                      va="center", fontsize=8 if len(names) <= 24 else 6,
                      weight="bold" if name in best else "normal",
                      arrowprops={"arrowstyle": "-", "color": colour(name), "linewidth": 0.6,
                                  "alpha": 0.6, "shrinkA": 0, "shrinkB": 3})  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    """One line on a result, while others are being measured."""
    if "reason" in result:
        return result["reason"]
    accuracies = ", ".join(f"{accuracy:.1f}" for accuracy in result["accuracies"])
    losses = result["held_out_loss_by_rate"].items()
    rates = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in losses)
    return f"{accuracies} % in {result['total_s']:.0f} s; held-out loss by rate {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of data and weights (or GIFT_DATA)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored")
    parser.add_argument("--costs", action="store_true", help="measure time and memory alone again")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for key, task in tasks_that_are_there(parser, args.tasks, args.data):
        print(f"{task.title}: source at the start {task.start:.2f} %", flush=True)
        for name in args.only:
            settings = settings_of(name, task, args.seeds)
            old = stored(args.out)["tasks"].get(key, {"contenders": {}})["contenders"].get(name)
            if args.costs and old is not None and "reason" not in old:
                store(args.out, key, task, name, old | costs(name, task))
            elif old is None or args.fresh or old["settings"] != settings:
                result = {"settings": settings} | measure(name, task, args.seeds)
                store(args.out, key, task, name, result)
                print(f"  {name}: {summary(result)}", flush=True)
    results = stored(args.out)
    for task in results["tasks"].values():
        print("\n" + table(task))
    if results["tasks"]:
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
