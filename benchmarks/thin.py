"""Products of a factor of a delta with all rows of a linear layer: the factor first, or the rows.

`gift.kernels.thin` takes the one or the other by the rank alone; this script checks that on other
machines. For each layer, number of rows and rank it prints the time of the six products of a step
with the rows first, as a part of that with the factor first. The two take turns; medians.

Prediction: the factor first is quicker up to rank 8, the rows first from rank 16 on, whatever the
sizes are; with few rows the rows first is quicker at all ranks.

    python benchmarks/thin.py [--rounds 25] [--threads 2]
"""

from collections.abc import Callable
from statistics import median

import torch
from _measuring import in_turn, rounds_of_products
from tabulate import tabulate

from gift.kernels import thin

SIZES = ((384, 384), (1536, 384), (384, 1536), (2048, 2048))
ROWS = (32, 128, 512, 1024, 3072)
RANKS = (4, 8, 16, 32, 64, 128)


def step(rows: int, outputs: int, inputs: int, rank: int, largest: int) -> Callable[[], None]:
    """The products of a layer; `largest` is the largest rank for which the factor comes first."""
    g, x, y = torch.randn(rows, outputs), torch.randn(rows, inputs), torch.empty(rows, outputs)
    left, right, gx = torch.randn(outputs, rank), torch.randn(rank, inputs), torch.empty_like(x)

    def run() -> None:
        thin.THIN = largest
        hidden = thin.times(right, x)
        thin.add(y, hidden, left.mT)
        back = thin.back(left, g)
        thin.of_left(hidden, g), thin.of_right(back, x)
        thin.add(gx, back, right)

    return run


def main() -> None:
    rounds = rounds_of_products(__doc__.splitlines()[0])
    table = []
    for outputs, inputs in SIZES:
        for rows in ROWS:
            line: list[object] = [f"{outputs} x {inputs}", rows]
            for rank in RANKS:
                orders = {"factor": rank, "rows": 0}
                steps = {n: step(rows, outputs, inputs, rank, most) for n, most in orders.items()}
                seconds = {n: median(s) for n, s in in_turn(steps, rounds).items()}
                line.append(f"{seconds['rows'] / seconds['factor']:.2f}")
            table.append(line)
    print(tabulate(table, ["layer", "rows", *(f"rank {rank}" for rank in RANKS)]))


if __name__ == "__main__":
    main()
