"""Boxes in images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gift.core.io_spec import IOSpec
from gift.errors import TrainingError
from gift.training.drawings import Sample, boxed, bytes_of, png, tints
from gift.training.predictions import Detected, Options
from gift.training.tasks.base import Task, text, wide

SHOWN_SCORE = 0.5
"""Lowest score of the boxes that a report draws."""


class Detection(Task):
    """Boxes in images, for torchvision detectors, which compute their losses themselves."""

    name = "detection"
    watch = "map"

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return a dictionary of boxes, labels and scores for each image."""
        return net(batch[0])

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """Return the sum of the losses that the network returns."""
        losses = net(*batch)
        if not isinstance(losses, Mapping):
            raise TrainingError(
                f"the network gives {text(losses)} in training, expected a dictionary of losses, "
                "as torchvision's detectors give it"
            )
        return torch.stack([wide(loss) for loss in losses.values()]).sum() * self.count(batch)

    def judged(self, net: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Return the detections; detectors return no loss in evaluation mode."""
        return self.outputs(net, batch), None

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return outputs and targets unchanged."""
        return outputs, self.targets(batch)

    def drawn(self, outputs: Any, batch: Any, reader: Any) -> list[Sample]:
        """Return images, each with its true boxes, and beside it with the predicted ones."""
        found = []
        for x, target, said in zip(*batch, outputs, strict=True):
            image = bytes_of(x)
            sure = said["scores"].cpu() >= SHOWN_SCORE
            boxes, labels = said["boxes"].cpu()[sure], said["labels"].cpu()[sure].tolist()
            true = target["labels"].cpu().tolist()
            views = [
                boxed(image, target["boxes"].cpu(), [self._named(n) for n in true], tints(true)),
                boxed(image, boxes, [self._named(n) for n in labels], tints(labels)),
            ]
            caption = f"{len(true)} true boxes, {len(labels)} predicted with a score of "
            found.append(Sample(f"{caption}{SHOWN_SCORE} or more", png(views)))
        return found

    def _named(self, number: int) -> str:
        known = self.classes or ()
        return known[number] if 0 <= number < len(known) else str(number)

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the objects with the highest scores, of at least the threshold."""
        names, found = known.classes, []
        for item, objects in zip(items, outputs, strict=True):
            scores = objects["scores"].cpu()
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] >= (options.threshold or 0.0)][: options.top]
            boxes, labels = objects["boxes"].cpu()[order], objects["labels"].cpu()[order].tolist()
            if names is not None and max(labels, default=0) >= len(names):
                raise TrainingError(
                    f"the network finds class {max(labels)}, {len(names)} are named"
                )
            named = [label if names is None else names[label] for label in labels]
            found.append(Detected(item, boxes.tolist(), named, scores[order].tolist()))
        return found
