"""The next token of a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.io_spec import IOSpec
from gift.data.examples import IGNORED
from gift.errors import TrainingError
from gift.training.predictions import Options, Written
from gift.training.tasks.base import Task, text, wide
from gift.wrappers import labelled


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
        if not isinstance(batch, Mapping):
            return super().outputs(net, batch)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of rows with several examples
            batch = {**batch, "attention_mask": _additive(mask, net)}
        with labelled(batch.get("labels")):
            outputs = super().outputs(net, batch)
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

    @classmethod
    def answered(cls, net: nn.Module, batch: Any, known: IOSpec, options: Options) -> Any:
        """Return the tokens that a network writes after each prompt, by greedy decoding."""
        generate = getattr(net, "generate", None)
        tokenizer = getattr(known.reader, "tokenizer", None)
        if generate is None or tokenizer is None or not isinstance(batch, Mapping):
            raise TrainingError(
                "predict writes texts by a language model of transformers, with generate, and its "
                "tokenizer; other networks are called by themselves"
            )
        tokens, mask = _at_the_right(batch["input_ids"], batch["attention_mask"])
        written = generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=options.max_new_tokens,
            do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)

    @classmethod
    def predicted(
        cls, items: Sequence[Any], outputs: Any, known: IOSpec, options: Options
    ) -> list[Any]:
        """Return the texts that were written."""
        return [Written(item, said) for item, said in zip(items, outputs, strict=True)]


def _additive(mask: Tensor, net: nn.Module) -> Tensor:
    """Return a mask of booleans as numbers that attentions add, in the dtype of the network."""
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )


def _at_the_right(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding to the left, since what is written follows the last token of a row."""
    left = mask.shape[1] - mask.sum(1)
    first = mask.argmax(1)
    order = torch.arange(mask.shape[1], device=mask.device) - left[:, None] + first[:, None]
    order = order % mask.shape[1]
    return tokens.gather(1, order), mask.gather(1, order)
