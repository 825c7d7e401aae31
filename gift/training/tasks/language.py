"""The next token of a text."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gift.data.examples import IGNORED
from gift.errors import TrainingError
from gift.training.tasks.base import Task, text, wide


class Language(Task):
    """The next token at each position of a text, with cross-entropy loss."""

    name = "language"

    def targets(self, batch: Any) -> Any:
        """Return the next tokens of a dictionary, or the second part of a pair."""
        if not isinstance(batch, Mapping):
            return batch[1]
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"]
            if (mask := batch.get("attention_mask")) is not None:
                labels = labels.masked_fill(mask == 0, IGNORED)
        return labels[:, 1:]

    def outputs(self, net: Any, batch: Any) -> Any:
        """Return the logits at the positions that are followed by a token."""
        outputs = super().outputs(net, batch)
        if not isinstance(batch, Mapping):
            return outputs
        return outputs[:, -batch["input_ids"].shape[1] :][:, :-1]

    def _fit(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.dim() != 3:
            raise TrainingError(
                f"the network gives {text(outputs)}, expected logits (batch, length, tokens): "
                "is it a language model with its head?"
            )
        self.number_of_classes = outputs.shape[2]
        self.check(batch)

    def check(self, batch: Any) -> None:
        """Check that the tokens are in the vocabulary."""
        targets = self.targets(batch).long()
        known = targets[targets != IGNORED]
        if len(known) and not 0 <= known.min() <= known.max() < self.number_of_classes:
            raise TrainingError(
                f"there are tokens from {known.min()} to {known.max()}, the network knows those "
                f"from 0 to {self.number_of_classes - 1}: is it the tokenizer of this network?"
            )

    def count(self, batch: Any) -> int:
        """Count the tokens that are predicted, those with a token before them."""
        return int((self.targets(batch).long() != IGNORED).sum())

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            wide(outputs.flatten(0, 1)),
            targets.flatten().long(),
            reduction="sum",
            label_smoothing=self.smoothing,
        )

    def shown(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        """Flatten all positions into one sequence."""
        return outputs.float().flatten(0, 1), self.targets(batch).long().flatten()
