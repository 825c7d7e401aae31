"""What enabling costs, gift beside PEFT: time for many layers and for a large shape, and memory.

Contenders take turns within one run, each on a fresh network. Medians are printed; everything is
written to ``results/enable.json``.

    python benchmarks/enable.py [--rounds 5] [--layers 4000] [--out FILE]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _common import linear_pattern, llama_7b, machine, peak, write_results
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import nn

from gift import enable_fine_tuning
from gift.strategies.lora import LoRALinearFineTuningStrategy

RANK = 3
# Layers, width and rank where memory is measured: its deltas stand out from single pages.
MEMORY_LAYERS, MEMORY_WIDTH, MEMORY_RANK = 24, 2048, 64


def adapt_with_gift(network: nn.Module, rank: int, _pattern: str) -> list[nn.Parameter]:
    enable_fine_tuning(network, LoRALinearFineTuningStrategy(rank=rank))
    return list(network.parameters())


def adapt_with_peft(network: nn.Module, rank: int, pattern: str) -> list[nn.Parameter]:
    model = get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern))
    return [p for p in model.parameters() if p.requires_grad]


CONTENDERS = {"gift": adapt_with_gift, "peft": adapt_with_peft}


def linear_layers(number: int, width: int = 64) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(number)])


def compare(make: Callable[[], nn.Module], rounds: int) -> dict[str, Any]:
    """Seconds to adapt a fresh network, after a first round that does not count."""
    pattern = linear_pattern(make())
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    trained: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, adapt in CONTENDERS.items():
            network = make()
            gc.collect()
            start = time.perf_counter()
            deltas = adapt(network, RANK, pattern)
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
            trained[name] = sum(p.numel() for p in deltas)
            del network, deltas
    if len(set(trained.values())) > 1:
        raise RuntimeError(f"the contenders did not adapt the same layers: {trained}")
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "trained_parameters": trained["gift"],
        "median_s": medians,
        "peft_over_gift": medians["peft"] / medians["gift"],
        "rounds_s": seconds,
    }


def memory(contender: str) -> dict[str, int]:
    """By how much the peak memory of this process grows while it adapts a network."""
    adapt = CONTENDERS[contender]
    small, network = linear_layers(2), linear_layers(MEMORY_LAYERS, MEMORY_WIDTH)
    pattern = linear_pattern(network)
    adapt(small, RANK, pattern)  # what is loaded on first use is no part of the growth
    base = sum(p.nbytes for p in network.parameters())
    gc.collect()
    before = peak()  # now, as building the network only ever grew it
    deltas = adapt(network, MEMORY_RANK, pattern)
    return {
        "base_bytes": base,
        "delta_bytes": sum(p.nbytes for p in deltas),
        "peak_growth_bytes": peak() - before,
    }


def compare_memory(rounds: int) -> dict[str, Any]:
    """`memory`, in a fresh process for each contender and round."""
    runs: dict[str, list[dict[str, int]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--memory-of", name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[name].append(json.loads(out.splitlines()[-1]))
    growth = {name: [run["peak_growth_bytes"] for run in runs[name]] for name in CONTENDERS}
    return {
        "network": f"{MEMORY_LAYERS} x Linear({MEMORY_WIDTH}, {MEMORY_WIDTH}), rank {MEMORY_RANK}",
        "base_bytes": runs["gift"][0]["base_bytes"],
        "delta_bytes": {name: runs[name][0]["delta_bytes"] for name in CONTENDERS},
        "median_growth_bytes": {name: median(values) for name, values in growth.items()},
        "rounds_growth_bytes": growth,
    }


def table(results: dict[str, Any]) -> str:
    kept = results["memory"]
    cases = {
        f"adapting {results['layers']:,} Linear(64, 64), s": results["many_layers"]["median_s"],
        "adapting Llama 7B on the meta device, s": results["llama_7b_meta"]["median_s"],
        "bytes of the deltas, MB": {k: v / 1e6 for k, v in kept["delta_bytes"].items()},
        "growth of the peak memory, MB": {
            k: v / 1e6 for k, v in kept["median_growth_bytes"].items()
        },
    }
    rows = [[title, v["gift"], v["peft"], v["peft"] / v["gift"]] for title, v in cases.items()]
    header = ["median", "gift", "peft", "peft / gift"]
    return tabulate(rows, headers=header, floatfmt=("", ".3f", ".3f", ".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/enable.json")
    parser.add_argument("--memory-of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(json.dumps(memory(args.memory_of)))
        return
    results = {
        "machine": machine(),
        "rank": RANK,
        "layers": args.layers,
        "many_layers": compare(lambda: linear_layers(args.layers), args.rounds),
        "llama_7b_meta": compare(llama_7b, args.rounds),
        "memory": compare_memory(args.rounds),
    }
    print(table(results))
    write_results(args.out, results)


if __name__ == "__main__":
    main()
