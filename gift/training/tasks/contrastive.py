"""Vectors in which what belongs together is close."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gift.core.io_spec import IOSpec
from gift.errors import TrainingError, closest
from gift.support.optional import require
from gift.training.predictions import Embedded, Options
from gift.training.tasks.base import Task, accepted, keywords_of, text

LOSSES = (
    "NTXentLoss", "SupConLoss", "TripletMarginLoss", "MultiSimilarityLoss", "ContrastiveLoss",
    "CircleLoss", "LiftedStructureLoss", "NPairsLoss",
)  # fmt: skip
"""Losses of pytorch-metric-learning without weights of their own."""


class Contrastive(Task):
    """Vectors of examples, close to those of the same class or pair, and far from others.

    Targets are numbers: examples with the same one belong together. The loss is one of
    pytorch-metric-learning, or a function of vectors (batch, size) and targets. The vector of a
    text is the mean over its tokens, for networks that give a state for each.
    """

    name = "contrastive"
    watch = "recall_at_1"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.metric_loss: Any = None

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return a vector for each example (batch, size)."""
        if not isinstance(batch, Mapping):
            return net(batch[0])
        known = {k: v for k, v in batch.items() if k not in ("labels", "label")}
        return pooled(net(**accepted(known, self.keywords)), batch)

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise TrainingError(
                f"the network gives {text(outputs)}, expected vectors (batch, size): take a body "
                "without its head"
            )
        self.check(batch)
        if self.own_loss is None:
            self.metric_loss = metric_loss(str(self.details.get("loss", LOSSES[0])))

    def check(self, batch: Any) -> None:
        """Check that there is a whole number for each example."""
        targets = self.targets(batch)
        if targets.dim() != 1 or targets.is_floating_point():
            raise TrainingError(
                f"the targets are {text(targets)}, expected a class number for each example, or "
                "the number of its pair"
            )

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.metric_loss(outputs.float(), targets.long())
        return loss * len(targets)

    @classmethod
    def answered(cls, net: nn.Module, batch: Any, known: IOSpec, options: Options) -> Any:
        """Return a vector for each input."""
        if isinstance(batch, Mapping):
            return pooled(net(**accepted(batch, keywords_of(net))), batch)
        return net(batch)

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the vectors, of length 1."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise TrainingError(f"the network gives {text(outputs)}, expected vectors")
        unit = nn.functional.normalize(outputs.float(), dim=1).cpu()
        return [Embedded(item, row) for item, row in zip(items, unit, strict=True)]


def pooled(found: Any, batch: Mapping[str, Any]) -> Any:
    """Return a vector for each text: the mean of its states, without padding."""
    states = found.get("last_hidden_state") if isinstance(found, Mapping) else found
    states = getattr(found, "last_hidden_state", states)
    if not isinstance(states, Tensor) or states.dim() != 3:
        return states
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != states.shape[:2]:
        return states.mean(1)
    mask = mask[..., None].to(states)
    return (states * mask).sum(1) / mask.sum(1).clamp_min(1)


def metric_loss(name: str) -> Any:
    """Return the loss of pytorch-metric-learning of this name, one of `LOSSES`.

    Raises:
        TrainingError: if there is no such loss.
    """
    if name not in LOSSES:
        raise TrainingError(
            f"there is no contrastive loss {name!r}, closest: {closest(name, LOSSES)}; known: "
            f"{list(LOSSES)}"
        )
    return getattr(require("pytorch_metric_learning.losses", "contrastive"), name)()
