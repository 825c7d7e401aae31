"""Numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from gift.core.io_spec import IOSpec
from gift.errors import TrainingError
from gift.training.predictions import Number, Options
from gift.training.tasks.base import Task, sides, text, wide


class Scale(NamedTuple):
    """Mean and standard deviation of numbers that a network predicts in standardised form."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> "Scale":
        """Return the scale that `details` records, else one that changes nothing.

        Raises:
            TrainingError: if it is not valid, as files may say anything.
        """
        given = details.get("scale")
        if given is None:
            return cls()
        try:
            found = cls(float(given["mean"]), float(given["std"]))
        except (TypeError, KeyError, ValueError, OverflowError):
            found = cls(math.nan)
        if not (math.isfinite(found.mean) and math.isfinite(found.std) and found.std > 0):
            raise TrainingError(f"the scale of the targets is {given!r:.80}, expected mean and std")
        return found


class Regression(Task):
    """Numbers, with mean squared error.

    If `details` has a "scale", the network predicts standardised numbers: the loss is that of
    these, metrics are those of the numbers themselves.
    """

    name = "regression"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = Scale.of(self.details)

    def _fit(self, outputs: Any, batch: Any) -> None:
        targets = self.targets(batch)
        if not isinstance(outputs, Tensor) or sides(outputs) != sides(targets):
            raise TrainingError(
                f"the network gives {text(outputs)}, the targets are {text(targets)}: expected "
                "as many, in the same order"
            )
        if outputs.is_complex() or targets.is_complex():
            raise TrainingError(
                f"the network gives {text(outputs)}, the targets are {text(targets)}: expected "
                "real numbers; torch.view_as_real makes two of a complex one"
            )

    def own_pair(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Targets have the shape of the outputs; they may be a column or a row."""
        return outputs, self._standard(targets).view_as(outputs)

    def _standard(self, targets: Tensor) -> Tensor:
        mean, std = self.scale
        return targets if (mean, std) == (0.0, 1.0) else (targets - mean) / std

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        given = wide(outputs)
        targets = self._standard(targets.to(given)).view_as(given)
        squares = F.mse_loss(given, targets, reduction="none")
        return squares.flatten(1).mean(1).sum() if squares.dim() > 1 else squares.sum()

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Flatten all numbers into one sequence, in the units of the targets."""
        mean, std = self.scale
        return outputs.float().flatten() * std + mean, self.targets(batch).float().flatten()

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the numbers, in the units of the targets."""
        mean, std = Scale.of(known.details)
        if not isinstance(outputs, Tensor) or len(outputs) != len(items):
            raise TrainingError(f"the network gives {text(outputs)}, expected numbers (batch, ...)")
        rows = (outputs.cpu().double().reshape(len(items), -1) * std + mean).tolist()
        return [
            Number(item, row[0] if len(row) == 1 else row)
            for item, row in zip(items, rows, strict=True)
        ]
