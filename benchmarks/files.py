"""What files cost: saving and loading the delta of a network of the shape of Llama 7B.

The base is bfloat16, the delta LoRA of every linear layer in float32, the disk whatever the folder
for temporary files is on. Memory for the base is asked for and never written, so that its 13 GB
need not be there; reading it for the digests costs what it costs otherwise. Contenders take turns;
medians are printed, everything is written to ``results/files.json``.

    python benchmarks/files.py [--rounds 5] [--rank 16] [--layers 32] [--out FILE]
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _common import linear_pattern, llama_7b, machine, write_results
from peft import LoraConfig, PeftModel, get_peft_model
from tabulate import tabulate
from torch import nn

import gift
from gift.strategies.lora import LoRALinearFineTuningStrategy


def base(layers: int) -> nn.Module:
    net = llama_7b(layers).to(torch.bfloat16)
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(zeros(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = zeros(buffer)
    return net


def zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros by numpy, whose memory is that of the system, which has none until it is written."""
    size = like.numel() * like.element_size()
    return torch.from_numpy(np.zeros(size, np.uint8)).view(like.dtype).view(like.shape)


def timed(action: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def size(path: Path) -> int:
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files)


def rounds(number: int, rank: int, layers: int, folder: Path) -> dict[str, Any]:
    """Seconds to save and to load, and bytes on the disk."""
    tuned, wrapped = base(layers), base(layers)
    pattern = linear_pattern(tuned)
    gift.enable_fine_tuning(tuned, LoRALinearFineTuningStrategy(rank=rank))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
    model: Any = get_peft_model(wrapped, config)
    whole, brief, other = folder / "a.safetensors", folder / "b.safetensors", folder / "peft"
    saving = {
        "gift": lambda: gift.save(tuned, whole),
        "gift, without digests of the base": lambda: gift.save(tuned, brief, digest_base=False),
        "peft": lambda: model.save_pretrained(other, save_embedding_layers=False),
    }
    loading = {
        "gift": lambda net: gift.load(net, whole),
        "gift, without digests of the base": lambda net: gift.load(net, brief),
        "peft": lambda net: PeftModel.from_pretrained(net, other),
    }
    seconds: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in saving} for what in ("saving", "loading")
    }
    for turn in range(number + 1):
        for name in saving:
            took = timed(saving[name])
            fresh = base(layers)
            loaded = timed(lambda name=name, fresh=fresh: loading[name](fresh))
            del fresh
            if turn:  # the first round does not count
                seconds["saving"][name].append(took)
                seconds["loading"][name].append(loaded)
    paths = dict(zip(saving, (whole, brief, other), strict=True))
    return {
        "trained_parameters": sum(p.numel() for p in tuned.parameters()),
        "base_bytes": sum(p.nbytes for _, p in tuned.named_parameters() if not p.requires_grad),
        "median_s": {
            what: {name: median(values) for name, values in by_name.items()}
            for what, by_name in seconds.items()
        },
        "bytes": {name: size(path) for name, path in paths.items()},
        "rounds_s": seconds,
    }


def table(found: dict[str, Any]) -> str:
    rows = [
        [name, saved, found["median_s"]["loading"][name], found["bytes"][name] / 1e6]
        for name, saved in found["median_s"]["saving"].items()
    ]
    header = ["contender", "saving, s", "loading onto the base, s", "MB"]
    return tabulate(rows, headers=header, floatfmt=("", ".2f", ".2f", ".1f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/files.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = rounds(args.rounds, args.rank, args.layers, Path(folder))
    print(table(found))
    results = {"machine": machine(), "rank": args.rank, "layers": args.layers, **found}
    write_results(args.out, results)


if __name__ == "__main__":
    main()
