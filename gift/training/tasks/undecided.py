"""Classification or regression, whichever the first batch is."""

import warnings
from typing import Any

from torch import Tensor, nn

from gift.errors import GiftWarning
from gift.training.tasks.base import Task, keywords_of, text
from gift.training.tasks.classification import Classification
from gift.training.tasks.regression import Regression


class Undecided(Task):
    """Classification or regression, decided by the targets and the outputs of the network.

    Floating-point targets with one output for each of them mean regression.
    """

    name = "undecided"

    def fit(self, net: nn.Module, batch: Any) -> Task:
        """Return the task that fits the batch, already fitted to it."""
        self.keywords = keywords_of(net)
        outputs, targets = self.outputs(net, batch), self.targets(batch)
        kind = Regression if _is_regression(outputs, targets) else Classification
        if kind is Regression and bool(((targets == 0) | (targets == 1)).all()):
            warnings.warn(
                f"the targets, {text(targets)}, are treated as numbers to predict, though they "
                "are all 0 or 1: for two classes, choose task='classification', or give integer "
                "targets (targets.long()); task='regression' confirms that they are numbers",
                GiftWarning,
                stacklevel=5,
            )
        return kind(self.own_loss, self.smoothing, self.classes, self.details).fit(net, batch)


def _is_regression(outputs: Any, targets: Any) -> bool:
    """Whether there is one output for each target, and the targets are not class numbers."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    single = outputs.dim() == 1 or (outputs.dim() > 1 and outputs.shape[1] == 1)
    return single and targets.is_floating_point() and outputs.numel() == targets.numel()
