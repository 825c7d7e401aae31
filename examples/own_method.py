"""Write a method of your own, and compare it with LoRA.

    python own_method.py --steps 200

The method scales the rows and the columns of a weight. It works on every layer that gift knows.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import gift
from gift.factories import ma_adapt, mc_layer
from gift.methods import Method, register_method


@register_method
@dataclass(frozen=True)
class RowsAndColumns(Method):
    r"""One factor for each row and each column.

    .. math:: W' = \operatorname{diag}(r) \, W_0 \operatorname{diag}(c)

    For a matrix ``(rows, columns)`` it adds ``scale_rows (rows, 1)`` and ``scale_columns (1,
    columns)``, which start at one.
    """

    name: ClassVar[str] = "rows_and_columns"
    strategy_prefix: ClassVar[str] = "RowsAndColumns"

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return ones, so that the effective matrix is the frozen one."""
        *groups, rows, columns = matrix.shape
        like = self.factory_kwargs(matrix)
        return {
            "scale_rows": torch.ones(*groups, rows, 1, **like),
            "scale_columns": torch.ones(*groups, 1, columns, **like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Scale rows and columns."""
        return parameters["scale_rows"] * matrix * parameters["scale_columns"]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    base = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    teacher = copy.deepcopy(base)  # the same network, with other strengths of its features
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(torch.rand(len(p)).add(0.5).view(-1, *[1] * (p.dim() - 1)))
    images = torch.rand(64, 3, 16, 16)
    targets = teacher(images).detach()

    for method, settings in {"rows_and_columns": {}, "lora": {"rank": 2}}.items():
        net = copy.deepcopy(base)
        strategy = gift.FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))])
        report = gift.enable_fine_tuning(net, strategy)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses: list[float] = []
        for _ in range(args.steps):
            loss = nn.functional.mse_loss(net(images), targets)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learned = f"loss {losses[0]:.2e} -> {losses[-1]:.2e}"
        print(f"{method}: {report.trainable_after:,} parameters, {learned}")


if __name__ == "__main__":
    main()
