"""Switching between deltas on one network: gift beside PEFT, time to switch and of what follows.

A BERT-like network that was given four deltas of LoRA, rank 8, on every linear layer: `DeltaBank`
of gift, named adapters of PEFT. Measured are going over to another delta, the base for a while
(`disabled`, `disable_adapter`), merged weights for a while (`merged`, `merge_adapter`), and the
first forward pass after each. Contenders take turns; medians are printed, everything is written to
``results/switching.json``.

Predictions: a switch of gift costs what taking one fine-tuning off and putting another one on
costs, some milliseconds for 36 layers, PEFT's a walk over the network, about as much; forward
passes are those of `steps.py`; merging is mostly the products of the factors, and gift, which
leaves the base alone, makes copies of the weights in addition, but need not subtract afterwards.

    python benchmarks/switching.py [--rounds 15] [--layers 6] [--threads 2] [--out FILE]
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import adaptable_pattern, machine, write_results
from _contenders import as_after_a_step
from _measuring import keep_memory
from _networks import bert
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

import gift
from gift.strategies import LoRALinearFineTuningStrategy

RANK = 8
NAMES = [f"delta{number}" for number in range(4)]
SHAPES = [(1, 32), (8, 128)]  # batch and tokens
Actions = dict[str, Callable[[], AbstractContextManager[Any]]]


def fresh(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return bert(layers).eval()


def by_gift(network: nn.Module) -> Actions:
    """What gift does with the network, on which a delta of the bank is active."""
    bank = gift.DeltaBank(network)
    for name in NAMES:
        bank.add(name, strategy=LoRALinearFineTuningStrategy(rank=RANK))
        bank.activate(name)
        as_after_a_step(network)
    return {
        "another delta": switching(bank.activate),
        "base for a while": lambda: gift.disabled(network),
        "merged temporarily": lambda: gift.merged(network),
    }


def by_peft(model: Any) -> Actions:
    """What PEFT does with the network."""
    for name in NAMES:
        if name not in model.peft_config:
            model.add_adapter(name, model.peft_config[NAMES[0]])
        model.set_adapter(name)
        as_after_a_step(model)
    return {
        "another delta": switching(model.set_adapter),
        "base for a while": model.disable_adapter,
        "merged temporarily": lambda: peft_merged(model),
    }


def wrapped(network: nn.Module) -> nn.Module:
    """The network for PEFT."""
    pattern = adaptable_pattern(network)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern)
    return get_peft_model(network, config, adapter_name=NAMES[0])


@contextmanager
def peft_merged(model: Any) -> Iterator[None]:
    model.merge_adapter()
    yield
    model.unmerge_adapter()


def switching(activate: Callable[[str], None]) -> Callable[[], AbstractContextManager[None]]:
    """To the next delta, which stays when the block is over."""
    names = cycle(NAMES)

    @contextmanager
    def switch() -> Iterator[None]:
        activate(next(names))
        yield

    return switch


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(layers: int, shape: tuple[int, int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """For each contender and action the seconds to go in, of a forward pass there, and back."""
    plain, tuned, model = fresh(layers), fresh(layers), wrapped(fresh(layers)).eval()
    batch = torch.randint(0, 1000, shape)
    networks = {"plain": plain, "gift": tuned, "peft": model}
    actions = {"gift": by_gift(tuned), "peft": by_peft(model)}
    found: dict[str, dict[str, list[float]]] = {}

    def note(who: str, what: str, seconds: float, number: int) -> None:
        if number > 1:  # the first two rounds do not count
            found.setdefault(what, {}).setdefault(who, []).append(seconds)

    gc.collect()
    for number in range(rounds + 2):
        for who, network in networks.items():
            note(who, "forward", forward(network, batch), number)
        for what in actions["gift"]:
            for who, own in actions.items():
                block = own[what]()
                note(who, what, timed(block.__enter__), number)
                note(who, f"{what}: forward", forward(networks[who], batch), number)
                note(
                    who,
                    f"{what}: back",
                    timed(partial(block.__exit__, None, None, None)),
                    number,
                )
    return found


def forward(network: nn.Module, batch: Tensor) -> float:
    with torch.no_grad():
        return timed(lambda: network(batch))


def table(medians: dict[str, dict[str, float]]) -> str:
    rows = []
    for what, by_name in medians.items():
        if not what.endswith("delta: back"):  # nothing is undone there
            ms = {name: value * 1e3 for name, value in by_name.items()}
            ratio = ms["peft"] / ms["gift"]
            rows.append([what, ms.get("plain"), ms["gift"], ms["peft"], ratio])
    header = ["median, ms", "plain", "gift", "peft", "peft / gift"]
    return tabulate(rows, headers=header, floatfmt=("", ".2f", ".2f", ".2f", ".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/switching.json"
    )
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"rank": RANK, "layers": args.layers, "deltas": len(NAMES)}
    for batch, tokens in SHAPES:
        rounds = measure(args.layers, (batch, tokens), args.rounds)
        medians = {
            what: {name: median(values) for name, values in by_name.items()}
            for what, by_name in rounds.items()
        }
        results[f"{batch} x {tokens}"] = {"median_s": medians, "rounds_s": rounds}
        print(f"{batch} x {tokens} tokens\n\n{table(medians)}\n")
    results = {"machine": machine()} | results
    write_results(args.out, results)


if __name__ == "__main__":
    main()
