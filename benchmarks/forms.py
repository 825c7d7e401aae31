"""The forms of convolutions: what each takes, what the cost model expects, and its constants anew.

Each layer trains in every form that it can have, in turns, beside the frozen convolution. The
constants of `gift.kernels.cost_model` are then fitted to what was measured: least squares of the
whole layer's time, in parts of it. The table shows how much longer than the quickest form the
chosen one takes, with the constants as they are and as fitted.

Prediction: the choice costs less than 5 % over these layers, and on other processors too, as only
the ratios of the constants matter.

    python benchmarks/forms.py [--rounds 9] [--threads 2] [--write]
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _measuring import in_turn, keep_memory
from tabulate import tabulate
from torch import Tensor

from gift.kernels import cost_model
from gift.kernels.cost_model import FORMS, Plan
from gift.kernels.geometry import Geometry
from gift.kernels.low_rank_conv import LowRankConv

FITTED = ("CONV", "WHOLE", "GEMM", "SHIFT", "TOUCH", "NARROW", "MERGE", "START")
FACTORS = (0.5, 0.8, 0.9, 0.97, 1.03, 1.1, 1.25, 2)


class Layer(NamedTuple):
    """A convolution of as many outputs as inputs, and its batch."""

    channels: int
    kernel: int
    side: int
    images: int
    rank: int
    balanced: bool = False
    stride: int = 1

    @property
    def geometry(self) -> Geometry:
        """The convolution."""
        shape = (self.channels, self.channels, self.kernel, self.kernel)
        return Geometry(shape, (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1))

    @property
    def cuts(self) -> int:
        """Rows of the delta's matrix for each output."""
        return self.kernel if self.balanced else 1

    @property
    def positions(self) -> int:
        """How many are computed in the batch."""
        return self.images * math.prod(self.geometry.positions((self.side,) * 2))

    @property
    def plans(self) -> list[Plan]:
        """All that the layer can have."""
        ways = {self.geometry.pointwise or self.geometry.stride_one, self.geometry.pointwise}
        return [Plan(form, way) for way in sorted(ways) for form in FORMS]

    @property
    def chosen(self) -> Plan:
        """The choice of the cost model."""
        return cost_model.plan(
            self.geometry, self.rank, self.cuts, self.positions, images=self.images
        )

    def expected(self, plan: Plan) -> float:
        """Seconds beyond those of the frozen convolution, by the cost model."""
        sizes = self.geometry, self.rank, self.cuts, self.positions, self.images
        costs = cost_model.extra_costs(*sizes, as_product=plan.as_product, trained=True)
        return costs[plan.form] * 1e-9


LAYERS = [
    *(Layer(*size, rank) for size, rank in itertools.product(
        [(16, 3, 32, 16), (64, 3, 32, 8), (64, 3, 16, 1), (128, 3, 16, 16), (256, 3, 8, 16),
         (512, 3, 4, 8), (64, 1, 32, 8), (256, 1, 16, 8), (512, 1, 7, 1)],
        (3, 16, 64))),
    *(Layer(64, 3, 16, 16, rank, balanced=True) for rank in (1, 8)),
    *(Layer(256, 3, 8, 8, rank, balanced=True) for rank in (1, 8)),
    *(Layer(32, 7, 16, 8, rank) for rank in (3, 16)),
    *(Layer(128, 3, 16, 16, rank, stride=2) for rank in (3, 16)),
]  # fmt: skip

Measured = dict[Plan | None, float]
"""Seconds of a step of a layer for each plan, and for None those of the frozen convolution."""


def step(layer: Layer, plan: Plan | None) -> Callable[[], None]:
    """A training step of the layer by that plan, or of the frozen convolution."""
    geometry, rows = layer.geometry, layer.channels * layer.cuts
    x = torch.randn(layer.images, layer.channels, layer.side, layer.side, requires_grad=True)
    weight = torch.randn(geometry.shape)
    left = torch.randn(rows, layer.rank, requires_grad=True)
    right = torch.randn(layer.rank, weight.numel() // rows, requires_grad=True)

    def output() -> Tensor:
        if plan is None:
            return geometry.apply(x, weight)
        made: Tensor = LowRankConv.apply(x, weight, None, left, right, 1.0, None, geometry, plan)
        return made

    g = torch.randn_like(output())
    wanted = (x,) if plan is None else (x, left, right)

    def run() -> None:
        torch.autograd.grad(output(), wanted, g)

    return run


def measured(layer: Layer, rounds: int) -> Measured:
    """What each plan takes."""
    plans: list[Plan | None] = [None, *layer.plans]
    seconds = in_turn({str(plan): step(layer, plan) for plan in plans}, rounds)
    return {plan: median(seconds[str(plan)]) for plan in plans}


def misfit(table: dict[Layer, Measured]) -> float:
    """The mean square of what the cost model misses, in parts of the layer's time."""
    errors = [
        (seconds[None] + layer.expected(plan)) / taken - 1
        for layer, seconds in table.items()
        for plan, taken in seconds.items()
        if plan is not None
    ]
    return sum(error * error for error in errors) / len(errors)


def fit(table: dict[Layer, Measured]) -> dict[str, float]:
    """Change the constants of the cost model, one at a time, as long as it misses less."""
    best, moving = misfit(table), True
    while moving:
        moving = False
        for name, factor in itertools.product(FITTED, FACTORS):
            before = getattr(cost_model, name)
            setattr(cost_model, name, before * factor)
            if (now := misfit(table)) < best * (1 - 1e-4):
                best, moving = now, True
            else:
                setattr(cost_model, name, before)
    return {name: float(f"{getattr(cost_model, name):.2g}") for name in FITTED}


def losses(table: dict[Layer, Measured]) -> list[float]:
    """How much longer the chosen plan takes than the quickest, for each layer."""
    return [
        seconds[layer.chosen] / min(t for plan, t in seconds.items() if plan is not None)
        for layer, seconds in table.items()
    ]


def mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def write(constants: dict[str, float]) -> None:
    """Put the constants into the source of the cost model."""
    file = Path(str(cost_model.__file__))
    text = file.read_text(encoding="utf-8")
    for name, value in constants.items():
        text = re.sub(rf"^{name} = \S+", f"{name} = {value:g}", text, flags=re.MULTILINE)
    file.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="store the fitted constants")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    table = {layer: measured(layer, args.rounds) for layer in LAYERS}
    before: dict[str, Any] = {name: getattr(cost_model, name) for name in FITTED}
    chosen = [layer.chosen for layer in table]
    ratios, missed = losses(table), misfit(table)
    constants = fit(table)
    for name, value in constants.items():
        setattr(cost_model, name, value)
    anew = losses(table)
    rows = [
        [
            f"{s.channels} channels, {s.kernel}x{s.kernel}, {s.images} of {s.side}x{s.side}"
            + ", balanced" * s.balanced + f", stride {s.stride}" * (s.stride > 1),
            s.rank, seconds[None] * 1e3, plan.form, ratio, s.chosen.form, other,
        ]
        for (s, seconds), plan, ratio, other in zip(
            table.items(), chosen, ratios, anew, strict=True
        )
    ]  # fmt: skip
    header = ["layer", "rank", "frozen, ms", "form", "/ quickest", "as fitted", "/ quickest"]
    print(tabulate(rows, headers=header, floatfmt=("", "", ".2f", "", ".2f", "", ".2f")))
    print(f"\nthe chosen form / the quickest: {mean(ratios):.3f}, as fitted {mean(anew):.3f}")
    print(
        f"root mean square of the misfit: {missed**0.5:.2f}, as fitted {misfit(table) ** 0.5:.2f}"
    )
    print(tabulate([[n, before[n], constants[n]] for n in FITTED],
                   headers=["constant", "now", "fitted"], floatfmt="g"))  # fmt: skip
    if args.write:
        write(constants)


if __name__ == "__main__":
    main()
