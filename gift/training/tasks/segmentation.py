"""A class for each pixel."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.io_spec import IOSpec
from gift.data.examples import IGNORED
from gift.data.readers.masks import checked_colours, colours_of
from gift.errors import DataError, TrainingError
from gift.training.drawings import Sample, bytes_of, over, png
from gift.training.predictions import Options, Segmented, size_of
from gift.training.tasks.base import accepted, main_output, text
from gift.training.tasks.classification import Classification, two_logits

AUXILIARY = 0.5
"""Weight of the loss of torchvision's auxiliary heads, that of its reference training."""


class Segmentation(Classification):
    """A class for each pixel, with cross-entropy loss.

    Logits of a lower resolution are scaled up to that of the masks. An auxiliary head of a network
    of torchvision takes part in the training loss.
    """

    name = "segmentation"
    watch = "miou"

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() != 4:
            raise TrainingError(
                f"the network gives {text(outputs)}, expected logits (batch, classes, height, "
                "width): is it for segmentation?"
            )
        super()._fit(outputs, batch)

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return the logits at the resolution of the targets."""
        return _at(super().outputs(net, batch), self.targets(batch))

    def training_loss(self, net: Any, batch: Any) -> Tensor:
        """Return the training loss, as a sum, with that of an auxiliary head."""
        if isinstance(batch, Mapping):
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "label")}
            found = net(**accepted(inputs, self.keywords))
        else:
            found = net(batch[0])
        targets = self.targets(batch)
        loss = self.learnt_loss(_at(main_output(found), targets), batch)
        if isinstance(found, Mapping) and isinstance(found.get("aux"), Tensor):
            loss = loss + AUXILIARY * self.learnt_loss(_at(found["aux"], targets), batch)
        return loss

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Return the most probable class of each pixel, and its class."""
        logits, targets = self._pair(outputs.float(), self.targets(batch))
        return logits.argmax(1), targets

    @classmethod
    def answered(cls, net: nn.Module, batch: Any, known: IOSpec, options: Options) -> Any:
        """Return the logits; inputs of several sizes are computed one by one."""
        if isinstance(batch, list):
            return [super(Segmentation, cls).answered(net, x[None], known, options)[0]
                    for x in batch]  # fmt: skip
        return super().answered(net, batch, known, options)

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the class of each pixel, at the resolution of the image."""
        found = []
        for item, logits in zip(items, outputs, strict=True):
            if not isinstance(logits, Tensor) or logits.dim() != 3:
                raise TrainingError(
                    f"the network gives {text(logits)}, expected logits (classes, height, width)"
                )
            logits = logits[None].float()
            logits = two_logits(logits) if logits.shape[1] == 1 else logits
            count = logits.shape[1]
            names = known.classes or tuple(map(str, range(count)))
            if len(names) != count:
                raise TrainingError(
                    f"the network distinguishes {count} classes, but {len(names)} are named"
                )
            size = size_of(item)
            if size is not None:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            mask = logits.argmax(1)[0].cpu().to(torch.uint8 if count <= 256 else torch.int32)
            found.append(Segmented(item, mask, names, colours(known.details, count)))
        return found

    def drawn(self, outputs: Any, batch: Any, reader: Any) -> list[Sample]:
        """Return images, each beside its mask and the predicted one, both drawn over it."""
        if isinstance(batch, Mapping) or not isinstance(batch[0], Tensor):
            return []
        said, truth = (mask.cpu() for mask in self.shown(outputs, batch))
        named = colours(self.details, self.number_of_classes)
        mean, std = getattr(reader, "mean", (0,)), getattr(reader, "std", (1,))
        found = []
        for x, mask, guess in zip(batch[0], truth, said, strict=True):
            image = bytes_of(x, mean, std)
            if image.shape[1:] != mask.shape:
                return []
            known = mask != IGNORED
            right = (guess == mask)[known].float().mean().item() if known.any() else 0.0
            views = [image, over(image, mask, named, 0.6), over(image, guess, named, 0.6)]
            found.append(Sample(f"image, true mask, predicted mask: {right:.1%} right", png(views)))
        return found


def colours(details: Mapping[str, Any], number: int) -> list[list[int]]:
    """Return the colours of classes that `details` records, else those of Pascal VOC.

    Raises:
        TrainingError: if they are not valid, as files may say anything.
    """
    given = details.get("colours")
    try:
        return colours_of(number) if given is None else checked_colours(given, number)
    except DataError as error:
        raise TrainingError(f"the colours of the classes: {error}") from error


def _at(logits: Any, targets: Tensor) -> Any:
    """Scale logits (batch, classes, height, width) to the resolution of targets."""
    size = targets.shape[-2:]
    if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
