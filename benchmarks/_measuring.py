"""Time, bytes that are kept, and peak memory."""

import argparse
import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch
from _common import peak
from _contenders import CONTENDERS
from _networks import Case, loss, train
from torch import Tensor, nn

from gift.private.torch.autograd import bytes_kept_by

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**29),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_memory() -> None:
    """Start again with an allocator that keeps what was freed, in large pages.

    To touch fresh memory can take longer than all that is measured, and who of the contenders is
    given memory that another one freed is chance.
    """
    if sys.platform == "linux" and not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)


def rounds_of_products(description: str) -> int:
    """Read the options of a script that times products, prepare for it, and return the rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    rounds: int = args.rounds
    return rounds


def release_memory() -> None:
    """Give back what `keep_memory` kept of networks that are gone, as far as pages are free."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def usual_environment() -> dict[str, str]:
    """That of a process which gives memory back as it always does."""
    return {name: value for name, value in os.environ.items() if name not in ALLOCATOR}


def in_turn(
    actions: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that each took, in each round; two more rounds come first.

    The order is another one in each round, so that nobody has the same predecessor always.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order, chance = list(actions), random.Random(0)
    gc.collect()
    for number in range(rounds + 2):
        chance.shuffle(order)
        for name in order:
            start = clock()
            actions[name]()
            if number > 1:
                seconds[name].append(clock() - start)
    return seconds


def compared(seconds: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Medians, their ratios to that of the reference, and the quartiles of each round's ratio."""
    middle = {name: median(values) for name, values in seconds.items()}
    quartiles = {}
    for name, values in seconds.items():
        pairs = zip(values, seconds[reference], strict=True)
        ratios = [mine / other for mine, other in pairs]
        low, _, high = quantiles(ratios) if len(ratios) > 1 else ratios * 3
        quartiles[name] = [low, high]
    return {
        "ms": {name: value * 1e3 for name, value in middle.items()},
        "ratio": {name: value / middle[reference] for name, value in middle.items()},
        "quartiles": quartiles,
    }


def bytes_kept(network: nn.Module, batch: Tensor) -> int:
    """What a forward pass keeps for its backward pass, and nobody holds anyway."""
    held = [*dict(network.named_parameters(remove_duplicate=False)).values(), *network.buffers()]
    return bytes_kept_by(loss(network, batch).grad_fn, [*held, batch])


def growth(name: str, case: Case, rank: int) -> int:
    """By how much the peak memory of this process grows from a plain network to one that trained.

    That is the deltas, gradients, what is kept and what comes and goes; an optimizer is not there.
    """
    network, batch = case.network(), case.batch()
    with torch.no_grad():
        loss(network, batch[:1])  # what is loaded on first use is no part of the growth
    before = peak()
    network = case.laid_out(CONTENDERS[name](network, rank))
    for _ in range(3):
        train(network, batch)
    return peak() - before
