"""Prompt encoders: small networks through which virtual tokens are trained."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.forwards import ForwardMethod
from gift.methods.settings import choice, probability, whole


@dataclass(frozen=True)
class Encoded(ForwardMethod):
    """Base class of methods whose virtual tokens a prompt encoder may compute.

    The encoder ``g`` is a network of its own: the trained vectors ``E (n, dim)`` are its input, and
    ``g(E)`` are the virtual tokens. It is trained with `E`, and depends on nothing else. So it can
    be left out after training, as `gift.interop.save_peft` does. Files and states of gift hold `E`
    and `g`, from which training continues.

    Args:
        encoder: ``"mlp"``, ``"lstm"`` (a bidirectional LSTM and two linear layers), or None for
            virtual tokens that are trained themselves.
        encoder_size: width of the encoder's hidden layers; None means `dim`.
        encoder_layers: number of layers of the LSTM; None means 2.
        encoder_dropout: probability of dropout between layers of the LSTM, in training mode.
    """

    encoder: str | None = choice(None, "mlp", "lstm", enters_weight=False, kw_only=True)
    encoder_size: int | None = whole(None, enters_weight=False, kw_only=True)
    encoder_layers: int | None = whole(None, enters_weight=False, kw_only=True)
    encoder_dropout: float = probability(kw_only=True)

    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.relu)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.encoder is None and self.encoder_size is not None:
            problems.append(f"encoder_size={self.encoder_size} is that of an encoder: choose one")
        if self.encoder != "lstm" and (self.encoder_layers is not None or self.encoder_dropout):
            problems.append("encoder_layers and encoder_dropout are those of encoder='lstm'")
        if problems:
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}")

    def encoder_parameters(self, dim: int, outputs: int, like: dict[str, Any]) -> dict[str, Tensor]:
        """Return vectors `E`, normal as in ``nn.Embedding``, and the encoder's parameters.

        Args:
            dim: number of features of `E`.
            outputs: number of features of a virtual token.
            like: dtype and device.
        """
        size = self.encoder_size or dim
        made = {"tokens": torch.randn(self._count, dim, **like)}
        if self.encoder == "lstm":
            layers = self.encoder_layers or 2
            lstm = nn.LSTM(dim, size, layers, bidirectional=True, **like)
            made |= {f"lstm_{name}": p.detach() for name, p in lstm.named_parameters()}
        for i, (inputs, width) in enumerate(pairwise(self._widths(dim, size, outputs))):
            for name, p in nn.Linear(inputs, width, **like).named_parameters():
                made[f"encoder_{i}_{name}"] = p.detach()
        return made

    @property
    def _count(self) -> int:
        count: int = getattr(self, str(self.size_setting))
        return count

    def _widths(self, dim: int, size: int, outputs: int) -> list[int]:
        return [2 * size, 2 * size, outputs] if self.encoder == "lstm" else [
            dim, size, size, outputs]  # fmt: skip

    def virtual_tokens(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the virtual tokens ``(n, outputs)``: the trained ones, or what the encoder gives.

        Args:
            module: the wrapped module, whose mode says whether there is dropout.
            parameters: the trained tensors.
        """
        x = parameters["tokens"]
        if self.encoder is None:
            return x
        if self.encoder == "lstm":
            weights = [p for name, p in parameters.items() if name.startswith("lstm_")]
            layers, size = len(weights) // 8, weights[1].shape[1]  # 4 tensors, in 2 directions
            start = x.new_zeros(2 * layers, 1, size)
            dropout = self.encoder_dropout
            x = torch.lstm(
                x[None], (start, start), weights, True, layers, dropout, module.training, True, True
            )[0][0]
        first, *others = _linear_layers(parameters)
        x = F.linear(x, *first)
        for layer in others:
            x = F.linear(type(self).activation(x), *layer)
        return x


def _linear_layers(parameters: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(len(parameters)):
        if f"encoder_{i}_weight" not in parameters:
            return
        yield parameters[f"encoder_{i}_weight"], parameters[f"encoder_{i}_bias"]
