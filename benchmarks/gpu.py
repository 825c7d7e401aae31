"""Blocks of large language models on a GPU: gift beside PEFT, full fine-tuning and the bound.

Contenders, the bound among them, are those of ``steps.py``: LoRA of rank 16 on every linear layer,
no optimizer in a step. "Compiled" is the same network under `torch.compile`. Blocks have the shape
of Llama's, weights and activations are bfloat16, nothing is dropped. Contenders take turns, in
another order each round. Time is that of CUDA events; memory is how far the allocator goes above
what was allocated before the step: what is kept for the backward pass, gradients, and what comes
and goes. On the CPU, where only the script itself is proven, time is that of the clock and memory
is what the graph keeps.

Predictions: gift at most 1.10 of the bound in time and 1.05 in memory, compiled or not, from 4,096
tokens on; never slower than PEFT, and never more memory.

It takes less than ten minutes: `--minutes` stops it before the next case. Results are stored after
each case in the folder `--out`, by default ``$OUT`` or ``benchmarks/results``, as ``gpu.json``.

    python benchmarks/gpu.py [--device cuda] [--quick] [--minutes 8] [--rounds 10] [--out FOLDER]
        [--cases "2048 x 4096" ...] [--contenders bound gift ...]
"""

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _common import machine, write_results
from _contenders import CONTENDERS, as_after_a_step
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from gift.private.torch.autograd import bytes_kept_by

RANK = 16
BLOCKS = 2
WAYS = ("bound", "full", "gift", "peft")
COMPILED = ("gift", "peft")
TAKING_PART = [*WAYS, *(f"{name}, compiled" for name in COMPILED)]


class Case(NamedTuple):
    """Blocks and their input.

    Args:
        hidden: features of a token; the inner layer has 2.7 times as many, a head 128 of them.
        sequences, length: how many tokens there are.
    """

    hidden: int
    sequences: int
    length: int

    @property
    def name(self) -> str:
        """By features and tokens."""
        return f"{self.hidden} x {self.sequences * self.length}"

    def network(self, device: str) -> nn.Module:
        """The blocks in training mode, with the same weights each time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 43 // 16,
            num_hidden_layers=BLOCKS,
            num_attention_heads=max(1, self.hidden // 128),
            vocab_size=8,  # blocks get features, no words
            use_cache=False,
        )
        with torch.device(device):
            return LlamaModel(config).to(torch.bfloat16).train()

    def batch(self, device: str) -> Tensor:
        """The same features each time."""
        torch.manual_seed(1)
        shape = (self.sequences, self.length, self.hidden)
        return torch.randn(shape, device=device, dtype=torch.bfloat16)


CASES = [Case(2048, 4, 1024), Case(2048, 4, 4096), Case(4096, 4, 1024), Case(4096, 4, 4096)]
QUICK = [Case(32, 2, 8)]


def step(network: Any, batch: Tensor) -> None:
    """Forward and backward, without an optimizer."""
    for parameter in network.parameters():
        parameter.grad = None
    loss(network, batch).backward()


def loss(network: Any, batch: Tensor) -> Tensor:
    hidden: Tensor = network(inputs_embeds=batch).last_hidden_state
    return hidden.float().square().mean()


class Clock:
    """How time and memory are measured on the CPU."""

    def facts(self) -> dict[str, Any]:
        """What the device is."""
        return {"device": "cpu"}

    def seconds(self, action: Callable[[], None]) -> float:
        """How long it takes."""
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def memory(self, network: Any, batch: Tensor) -> int:
        """What a step needs beside what is there before it, in bytes."""
        held = [*dict(network.named_parameters()).values(), *network.buffers(), batch]
        return bytes_kept_by(loss(network, batch).grad_fn, held)


class CudaClock(Clock):
    """The same on a GPU of Nvidia or AMD."""

    def facts(self) -> dict[str, Any]:  # noqa: D102 - as in `Clock`
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
        }

    def seconds(self, action: Callable[[], None]) -> float:  # noqa: D102
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def memory(self, network: Any, batch: Tensor) -> int:  # noqa: D102
        for parameter in network.parameters():
            parameter.grad = None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(network, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


CLOCKS = {"cpu": Clock, "cuda": CudaClock}


def contender(name: str, case: Case, device: str) -> Any:
    """A network as that contender trains it, after a first step."""
    way, _, compiled = name.partition(", ")
    network: Any = CONTENDERS[way](case.network(device), RANK)
    if way in ("gift", "peft"):
        as_after_a_step(network)
    if compiled:
        torch._dynamo.reset()
        # The compiler for the CPU needs another one, for C++, which need not be there.
        network = torch.compile(network, backend="aot_eager" if device == "cpu" else "inductor")
    return network


def measure(case: Case, names: list[str], device: str, rounds: int) -> dict[str, Any]:
    """Time and memory of each contender, or why it has none."""
    clock, batch = CLOCKS[device](), case.batch(device)
    made, failed = {}, {}
    for name in names:
        try:
            network = contender(name, case, device)
            for _ in range(3):
                step(network, batch)
            made[name] = network
        except Exception as error:  # one contender that fails leaves the others
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    memory = {name: clock.memory(network, batch) for name, network in made.items()}
    steps = {name: partial(step, network, batch) for name, network in made.items()}
    return compared(in_turn(steps, clock, rounds), memory) | {"failed": failed}


def in_turn(
    steps: Mapping[str, Callable[[], None]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, chance = list(steps), random.Random(0)
    for number in range(rounds + 2):
        chance.shuffle(order)
        for name in order:
            taken = clock.seconds(steps[name])
            if number > 1:
                seconds[name].append(taken)
    return seconds


def compared(seconds: Mapping[str, list[float]], memory: Mapping[str, int]) -> dict[str, Any]:
    """Medians, and their ratios to the bound's."""
    middle = {name: median(values) for name, values in seconds.items()}
    found: dict[str, Any] = {
        "ms": {name: value * 1e3 for name, value in middle.items()},
        "bytes": dict(memory),
    }
    for kind, values in (("time", middle), ("memory", memory)):
        if bound := values.get("bound"):
            found[kind] = {name: value / bound for name, value in values.items()}
    return found


def table(results: Mapping[str, Any], names: list[str]) -> str:
    """Rows of cases, the bound in its units and all others as ratios to it."""
    rows = []
    for case, found in results.items():
        for kind, unit, scale in (("time", "ms", 1), ("memory", "bytes", 2**20)):
            bound = found[unit].get("bound", float("nan")) / scale
            ratios = [found.get(kind, {}).get(name) for name in names if name != "bound"]
            rows.append([case, {"ms": "ms", "bytes": "MiB"}[unit], bound, *ratios])
    header = ["hidden x tokens", "", "bound", *(name for name in names if name != "bound")]
    return tabulate(rows, header, floatfmt=".3f", missingval="-")


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=CLOCKS)
    parser.add_argument("--quick", action="store_true", help="a tiny case, to try the script")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    default = os.environ.get("OUT") or Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--contenders", nargs="*", default=TAKING_PART, choices=TAKING_PART)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: --device cpu --quick tries the script itself")
    file = Path(given.out) / "gpu.json"
    deadline = time.monotonic() + 60 * given.minutes
    stored = {"machine": machine() | CLOCKS[given.device]().facts(), "rank": RANK}
    results: dict[str, Any] = {}
    for case in QUICK if given.quick else CASES:
        if given.cases and case.name not in given.cases:
            continue
        if time.monotonic() > deadline:
            print(f"{case.name} and what follows is left out: {given.minutes} minutes are over")
            break
        results[case.name] = measure(case, given.contenders, given.device, given.rounds)
        write_results(file, stored | {"results": results})
        for name, reason in results[case.name]["failed"].items():
            print(f"{case.name}, {name}: {reason}")
    print(table(results, given.contenders))
    print(f"stored in {file}")


if __name__ == "__main__":
    main()
