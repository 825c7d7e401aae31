"""Products of matrices by torch's own library and by oneDNN: where the other one is the quicker.

Torch gives products of 32 bits on a processor to MKL. `gift.kernels.onednn` gives the large ones of
a backward pass to oneDNN where `prefers_onednn` says so; this script checks that on other
machines: "gradient" is that of a linear layer's input, ``g W``; "output" is ``x W^T``, which stays
with torch, so that a delta of zeros changes no bit. The two take turns; medians, and the part of
oneDNN of MKL.

Prediction: both keep the same units busy on a processor of Intel, and differ little; MKL takes the
narrower ones on a processor of AMD, a tenth to a quarter slower.

    python benchmarks/gemm.py [--rounds 25] [--threads 2]
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from _measuring import in_turn, rounds_of_products
from tabulate import tabulate
from torch import Tensor

from gift.kernels.onednn import by_onednn, prefers_onednn

SIZES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (1376, 512), (4096, 4096))
ROWS = (8, 128, 1024)


def pair(rows: int, outputs: int, inputs: int) -> dict[str, Callable[[], Tensor]]:
    """What is compared for a layer of that size."""
    g, x, weight = (
        torch.randn(rows, outputs),
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs),
    )
    return {
        "gradient by MKL": lambda: g @ weight,
        "gradient by oneDNN": lambda: by_onednn(g, weight),
        "output by MKL": lambda: F.linear(x, weight),
        "output by oneDNN": lambda: by_onednn(x, weight.mT),
    }


def main() -> None:
    rounds = rounds_of_products(__doc__.splitlines()[0])
    table = []
    for outputs, inputs in SIZES:
        for rows in ROWS:
            seconds = in_turn(pair(rows, outputs, inputs), rounds)
            ms = {name: median(values) * 1e3 for name, values in seconds.items()}
            ratios = [
                ms[f"{what} by oneDNN"] / ms[f"{what} by MKL"] for what in ("gradient", "output")
            ]
            table.append([f"{rows} x {outputs} x {inputs}", ms["gradient by MKL"], *ratios])
    print(f"gift takes oneDNN here: {prefers_onednn()}\n")
    header = [
        "rows x out x in",
        "gradient by MKL, ms",
        "gradient, oneDNN / MKL",
        "output, oneDNN / MKL",
    ]
    print(tabulate(table, headers=header, floatfmt=("", ".3f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
