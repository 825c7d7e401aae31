"""What enabling costs, gift beside PEFT: time for many layers and for a large shape, and memory.

Contenders take turns within one run, each on a fresh network; medians are printed and written to
``results/enable.json``.

    python benchmarks/enable.py [--rounds 5] [--layers 4000] [--out FILE]
"""

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

RANK = 3
CPU_SHAPE = (24, 2048)  # layers and width of the network whose memory is measured
CONTENDERS = ("gift", "peft")
Adapt = Callable[[nn.Module], list[nn.Parameter]]


def adapter(contender: str) -> Adapt:
    """A function that adapts every linear layer of a network and gives the deltas."""
    if contender == "gift":
        from gift import enable_fine_tuning
        from gift.strategies.lora import LoRALinearFineTuningStrategy

        def adapt(network: nn.Module) -> list[nn.Parameter]:
            enable_fine_tuning(network, LoRALinearFineTuningStrategy(rank=RANK))
            return list(network.parameters())
    else:
        from peft import LoraConfig, get_peft_model

        def adapt(network: nn.Module) -> list[nn.Parameter]:
            linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
            # Names rather than "all-linear", which passes the output layer of a transformer by.
            targets = sorted({name.rpartition(".")[2] for name in linear})
            if "0" in targets:  # a sequence: PEFT takes numbers for names as a pattern
                targets = r"\d+"
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
            model = get_peft_model(network, config)
            return [p for p in model.parameters() if p.requires_grad]

    return adapt


def linear_layers(number: int, width: int = 64) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(number)])


def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def compare(make: Callable[[], nn.Module], rounds: int) -> dict[str, Any]:
    """Seconds to adapt a fresh network, contenders taking turns after one round unmeasured."""
    adapts = {name: adapter(name) for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    trained: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, adapt in adapts.items():
            network = make()
            gc.collect()
            start = time.perf_counter()
            deltas = adapt(network)
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
        "min_s": {name: min(values) for name, values in seconds.items()},
        "rounds_s": seconds,
        "peft_over_gift": medians["peft"] / medians["gift"],
    }


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(contender: str) -> dict[str, int]:
    """Growth of this process's peak memory while it adapts a network, and the deltas' bytes."""
    adapt = adapter(contender)
    adapt(linear_layers(2))  # what is loaded on first use is no part of the growth
    layers, width = CPU_SHAPE
    network = linear_layers(layers, width)
    base = sum(p.numel() * p.element_size() for p in network.parameters())
    gc.collect()
    before = peak()
    deltas = adapt(network)
    growth = peak() - before
    return {
        "base_bytes": base,
        "delta_bytes": sum(p.numel() * p.element_size() for p in deltas),
        "peak_growth_bytes": growth,
    }


def compare_memory(rounds: int) -> dict[str, Any]:
    """`memory` in a fresh process for each contender and round."""
    results: dict[str, list[dict[str, int]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--memory-of", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(json.loads(out.splitlines()[-1]))
    first = results["gift"][0]
    growth = {n: median(r["peak_growth_bytes"] for r in runs) for n, runs in results.items()}
    return {
        "base_bytes": first["base_bytes"],
        "delta_bytes": {name: runs[0]["delta_bytes"] for name, runs in results.items()},
        "median_peak_growth_bytes": growth,
        "rounds_peak_growth_bytes": {
            name: [r["peak_growth_bytes"] for r in runs] for name, runs in results.items()
        },
    }


def machine() -> dict[str, Any]:
    import peft
    import transformers

    import gift

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gift": gift.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }


def table(results: dict[str, Any], layers: int) -> str:
    rows = [f"{'seconds, median':42} {'gift':>9} {'peft':>9} {'peft/gift':>9}"]
    named = {
        f"adapting {layers:,} Linear(64, 64)": results["many_layers"],
        "adapting Llama 7B on the meta device": results["llama_7b_meta"],
    }
    for title, result in named.items():
        ours, theirs = (result["median_s"][name] for name in CONTENDERS)
        rows.append(f"{title:42} {ours:9.3f} {theirs:9.3f} {theirs / ours:9.1f}")
    result = results["memory"]
    rows.append(f"\n{'MB, ' + '{} x Linear({w}, {w})'.format(CPU_SHAPE[0], w=CPU_SHAPE[1]):42}")
    for title, key in (
        ("deltas", "delta_bytes"),
        ("growth of peak memory while enabling", "median_peak_growth_bytes"),
    ):
        ours, theirs = (result[key][name] / 1e6 for name in CONTENDERS)
        rows.append(f"{title:42} {ours:9.2f} {theirs:9.2f}")
    rows.append(f"{'base network':42} {result['base_bytes'] / 1e6:9.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/enable.json")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(json.dumps(memory(args.memory_of)))
        return
    results = {
        "machine": machine(),
        "rank": RANK,
        "many_layers": compare(lambda: linear_layers(args.layers), args.rounds),
        "llama_7b_meta": compare(llama_7b, args.rounds),
        "memory": compare_memory(args.rounds),
    }
    print(table(results, args.layers))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
