"""A training step, the bytes that it keeps, and inference: gift beside the bound, PEFT and full.

The bound is the same network, everything frozen but one bias of its first layers: a forward pass
and the gradient of the activations, without any gradient of a weight. No way to train deltas
throughout a network does with fewer multiplications. "Bound, alike" is the bound of a transformer
with the products of its linear layers by the library that gift takes, which on some processors is
quicker than the one that torch takes. Full fine-tuning trains everything; gift and
PEFT train LoRA of the same rank on every convolution and linear layer, with the same number of
parameters. "Balanced" is the layout that gift's convolutions have by default, which has more
parameters or fewer; it has no counterpart in PEFT. "Every layer" adds convolutions in groups and
transposed ones, for which PEFT has no LoRA of this form. There is no optimizer in a step.

Contenders take turns within one run, in another order each round, after two rounds that do not
count. Ratios are those of medians. Float32, random weights and data, training mode, no dropout.

Predictions (with two threads):

* ResNet18 and ResNet50, both memory formats: gift at most 1.15 of the bound at rank 3 and 1.35 at
  rank 64, and never slower than full fine-tuning or PEFT, at any rank or batch.
* BERT and Llama: at most 1.06 of the bound at rank 3, 1.09 at rank 16, 1.05 with 24 x 128 tokens;
  at most 0.93 of PEFT at every rank.
* ConvNeXt, EfficientNet, MobileNetV3 with every layer: at most 1.4 of the bound; the UNet 1.3.
* Bytes kept: at most 1.03 of the bound's.
* Under torch.compile: not slower than without, one graph.
* Inference: merged as fast as the plain network; unmerged at most 1.05 of it where a batch fills
  the machine.

Each result is stored in ``results/steps.json`` at once; ``results/steps.md`` has tables of them,
``results/steps.png`` shows the steps by rank.

    python benchmarks/steps.py [--quick] [--parts step compiled inference memory]
        [--cases resnet18 bert ...] [--ranks 1 3 ...] [--batches 1 16 ...] [--rounds 15]
        [--resume] [--minutes 3]
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.utils
from _common import machine, write_results
from _contenders import CONTENDERS, networks, taking_part, trained
from _measuring import (
    bytes_kept,
    compared,
    growth,
    in_turn,
    keep_memory,
    release_memory,
    usual_environment,
)
from _networks import CASES, Case, loss, train
from _steps_plot import draw
from tabulate import tabulate
from torch import nn

import gift

RESULTS = Path(__file__).parent / "results"


class Task(NamedTuple):
    """What is measured at once."""

    part: str
    case: str
    batch: int
    rank: int


def tasks(part: str, case: str, ranks: tuple[int, ...], *batches: int) -> list[Task]:
    """All ranks with all batches; by default that of the case."""
    sizes = batches or (CASES[case].shape[0],)
    return [Task(part, case, batch, rank) for batch in sizes for rank in ranks]


PLAN = [
    *tasks("step", "resnet18", (1, 3, 16, 64)),
    *tasks("step", "bert", (1, 3, 16, 64)),
    *tasks("step", "resnet18, channels_last", (1, 3, 16, 64)),
    *tasks("step", "resnet50", (3, 64)),
    *tasks("step", "resnet50, channels_last", (3, 64)),
    *tasks("step", "bert, 24 x 128", (3, 16)),
    *tasks("step", "llama", (1, 3, 16, 64)),
    *tasks("step", "bert, 2 layers", (3,)),
    *tasks("step", "bert, 12 layers", (3,)),
    *tasks("step", "mobilenet", (3,)),
    *tasks("step", "efficientnet", (3,)),
    *tasks("step", "convnext", (3,)),
    *tasks("step", "unet", (3,)),
    *tasks("step", "resnet18", (3, 64), 1, 4),
    *tasks("step", "bert", (3, 64), 1, 4),
    *tasks("step", "resnet18", (3,), 64),
    *tasks("step", "bert", (3,), 16, 64),
    *tasks("inference", "resnet18", (3,), 1, 16, 64),
    *tasks("inference", "resnet50", (3,), 16, 64),
    *tasks("inference", "bert", (3,), 1, 8),
    *tasks("inference", "bert, 24 x 128", (3,)),
    *tasks("inference", "llama", (3,)),
    *tasks("memory", "resnet18", (3,)),
    *tasks("memory", "bert, 24 x 128", (3,)),
    *tasks("compiled", "resnet18", (3, 64)),
    *tasks("compiled", "bert", (3,)),
]
QUICK = [
    *tasks("step", "resnet18", (3, 64)),
    *tasks("step", "resnet18, channels_last", (3,)),
    *tasks("step", "resnet50", (3,)),
    *tasks("step", "bert", (3, 64)),
    *tasks("step", "llama", (3,)),
    *tasks("inference", "resnet18", (3,)),
    *tasks("inference", "bert", (3,)),
]


def step(case: Case, rank: int, rounds: int) -> dict[str, Any]:
    """Time of a step, and bytes that it keeps, of every contender."""
    batch, made = case.batch(), networks(case, rank, taking_part(case))
    found = compared(in_turn(steps_of(made, batch), rounds), "bound")
    kept = {name: bytes_kept(network, batch) for name, network in made.items()}
    return found | {
        "parameters": {name: trained(network) for name, network in made.items()},
        "bytes_kept": kept,
        "bytes_ratio": {name: size / kept["bound"] for name, size in kept.items()},
    }


def steps_of(made: dict[str, nn.Module], batch: torch.Tensor) -> dict[str, Callable[[], None]]:
    return {name: partial(train, network, batch) for name, network in made.items()}


def compiled(case: Case, rank: int, rounds: int) -> dict[str, Any]:
    """Time of a step with and without torch.compile, and how many graphs it is."""
    if reason := no_compiler():
        return {"reason": reason}
    batch, made = case.batch(), networks(case, rank, ["bound", "gift", "peft"])
    graphs = {}
    for name in list(made):
        whole: Any = torch.compile(made[name])
        made[f"{name}, compiled"] = whole
        before = graphs_so_far()
        train(whole, batch)
        graphs[name] = graphs_so_far() - before
    return compared(in_turn(steps_of(made, batch), rounds), "bound") | {"graphs": graphs}


def graphs_so_far() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def no_compiler() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        torch.compile(torch.sin)(torch.ones(8))
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return ""


def inference(case: Case, rank: int, rounds: int) -> dict[str, Any]:
    """Time of a forward pass, with deltas beside the weights and merged into them."""
    batch = case.batch()
    made: dict[str, Any] = {"plain": case.network()}
    for suffix in ("", ", merged"):
        both = networks(case, rank, ["gift", "peft"])
        made |= {name + suffix: network for name, network in both.items()}
    for network in made.values():
        network.eval()
    made["peft, merged"].merge_adapter()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(gift.merged(made["gift, merged"]))
        actions = {name: partial(loss, network, batch) for name, network in made.items()}
        return compared(in_turn(actions, rounds), "plain")


def memory(task: Task) -> dict[str, Any]:
    """Growth of the peak memory, of every contender in a fresh process of its own."""
    sizes = {}
    for name in taking_part(CASES[task.case]):
        command = [sys.executable, __file__, "--memory-of", name, "--cases", task.case]
        command += ["--batches", str(task.batch), "--ranks", str(task.rank)]
        command += ["--threads", str(torch.get_num_threads())]
        out = subprocess.check_output(
            command, env=usual_environment(), text=True, stderr=subprocess.DEVNULL
        )
        sizes[name] = int(out.splitlines()[-1])
    return {
        "bytes": sizes,
        "ratio": {name: size / sizes["bound"] for name, size in sizes.items()},
    }


PARTS = {"step": step, "inference": inference, "compiled": compiled}
COLUMNS = {
    "step": list(CONTENDERS),
    "bytes": list(CONTENDERS),
    "memory": list(CONTENDERS),
    "inference": ["plain", "gift", "peft", "gift, merged", "peft, merged"],
    "compiled": [n + more for n in ("bound", "gift", "peft") for more in ("", ", compiled")],
}
TITLES = {
    "step": "A training step",
    "bytes": "Bytes kept for the backward pass",
    "memory": "Peak memory of training steps, more than the plain network",
    "inference": "Inference",
    "compiled": "A training step under torch.compile",
}


def measure(task: Task, rounds: int) -> dict[str, Any]:
    """Everything about one task."""
    case = CASES[task.case].of(task.batch)
    if task.part == "memory":
        return task._asdict() | memory(task)
    found = PARTS[task.part](case, task.rank, rounds)
    return task._asdict() | {"shape": case.shape, "rounds": rounds} | found


def task_of(result: dict[str, Any]) -> Task:
    return Task(*(result[key] for key in Task._fields))


def row(result: dict[str, Any], key: str) -> list[Any]:
    """One line of a table: what it is, the reference in its unit, and all as ratios to that."""
    columns = COLUMNS[key]
    ratios = result["bytes_ratio" if key == "bytes" else "ratio"]
    values = result[{"bytes": "bytes_kept", "memory": "bytes"}.get(key, "ms")]
    reference = values[columns[0]] / (1 if "ms" in result and key != "bytes" else 1e6)
    digits = 4 if key == "bytes" else 3
    cells = [f"{ratios[n]:.{digits}f}" if n in ratios else "" for n in columns[1:]]
    row = [result["case"], result["batch"], result["rank"], f"{reference:.1f}", *cells]
    if "quartiles" in result and key != "bytes":
        wide = max(high - low for low, high in result["quartiles"].values())
        row.append(f"{wide / 2:.3f}")
    return row + ([" ".join(map(str, result["graphs"].values()))] if key == "compiled" else [])


def table(results: list[dict[str, Any]], key: str) -> str:
    """Markdown."""
    part = "step" if key == "bytes" else key
    mine = [result for result in results if result["part"] == part]
    columns = COLUMNS[key]
    unit = "MB" if key in ("bytes", "memory") else "ms"
    header = ["case", "batch", "rank", f"{columns[0]}, {unit}", *columns[1:]]
    header += ["+-"] if unit == "ms" else []
    header += ["graphs: bound, gift, peft"] if key == "compiled" else []
    rows = [row(result, key) for result in mine if "reason" not in result]
    notes = [f"{r['case']}: left out: {r['reason']}" for r in mine if "reason" in r]
    if not mine:
        return ""
    aligned = ["left"] + ["right"] * (len(header) - 1)
    made = tabulate(rows, header, "pipe", disable_numparse=True, colalign=aligned) if rows else ""
    return "\n".join([f"## {TITLES[key]}\n", made, *notes, ""])


def document(stored: dict[str, Any]) -> str:
    """All tables."""
    results = stored["results"]
    of_machine = ", ".join(f"{key} {value}" for key, value in stored["machine"].items())
    intro = (
        f'# Steps\n\n{of_machine}. Ratios to the first number of a row; "+-" is half of the '
        "widest range of quartiles of a round's ratios in that row.\n"
    )
    tables = (table(results, key) for key in TITLES)
    return "\n".join([intro, *(made for made in tables if made)])


def stored(file: Path | None) -> dict[str, Any]:
    if file is None or not file.exists():
        return {"results": []}
    return json.loads(file.read_text(encoding="utf-8"))


def added(results: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The results with another one, in the order of the plan."""
    all_of_them = [r for r in results["results"] if task_of(r) != task_of(result)] + [result]
    place = {task: number for number, task in enumerate(PLAN)}
    all_of_them.sort(key=lambda r: (place.get(task_of(r), len(PLAN)), task_of(r)))
    return {"machine": machine(), "results": all_of_them}


def write(results: dict[str, Any], file: Path) -> None:
    """The results, tables, and a plot."""
    write_results(file, results)
    file.with_suffix(".md").write_text(document(results), encoding="utf-8")
    draw(results["results"], file.with_suffix(".png"))


def chosen(args: argparse.Namespace) -> list[Task]:
    """The plan, or what of it, or beside it, was asked for."""
    plan = QUICK if args.quick else PLAN
    plan = [t for t in plan if t.part in args.parts and t.case in (args.cases or [t.case])]
    if not args.ranks and not args.batches:
        return plan
    found: list[Task] = []
    for part, case in dict.fromkeys((task.part, task.case) for task in plan):
        found += tasks(part, case, tuple(args.ranks or (3,)), *(args.batches or ()))
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a little, in about two minutes")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "memory"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--ranks", nargs="+", type=int, help="in place of those of the plan")
    parser.add_argument("--batches", nargs="+", type=int, help="in place of those of the plan")
    parser.add_argument("--rounds", type=int, help="15, or 5 if quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="leave out what is stored")
    parser.add_argument("--minutes", type=float, help="begin nothing later; resume goes on")
    parser.add_argument("--out", type=Path, help="results/steps.json; if quick, none")
    parser.add_argument("--memory-of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = args.parts or [*PARTS, "memory"]
    args.rounds = args.rounds or (5 if args.quick else 15)
    args.out = args.out or (None if args.quick else RESULTS / "steps.json")
    return args


def main() -> None:
    args = options()
    # High ranks give small layers more parameters than they have.
    warnings.filterwarnings("ignore", category=gift.GiftWarning)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        case = CASES[args.cases[0]].of(args.batches[0])
        print(growth(args.memory_of, case, args.ranks[0]))
        return
    keep_memory()
    start, results = time.perf_counter(), stored(args.out)
    done = {task_of(r) for r in results["results"] if r.get("rounds", args.rounds) == args.rounds}
    left = [task for task in chosen(args) if not args.resume or task not in done]
    for number, task in enumerate(left):
        if args.minutes and time.perf_counter() - start > args.minutes * 60:
            print(f"{len(left) - number} are left: go on with --resume", file=sys.stderr)
            break
        result = measure(task, args.rounds)
        release_memory()
        shown = {name: round(value, 3) for name, value in result.get("ratio", {}).items()}
        print(*task, result.get("reason", shown), file=sys.stderr, flush=True)
        results = added(results, result)
        if args.out:
            write(results, args.out)
    print(document(results))


if __name__ == "__main__":
    main()
