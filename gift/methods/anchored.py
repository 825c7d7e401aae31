"""Products of factors that do not start at zero: what they start at is subtracted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels.conv_layers import conv, conv_forwards
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.low_rank import linear, low_rank_forwards, low_rank_product
from gift.methods.base import RankedMethod
from gift.methods.lora import LoRA
from gift.private.torch.layers import convolve

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AnchoredLoRA(LoRA):
    r"""Base of methods that start LoRA's factors at :math:`B_0 A_0`, a part of the weight.

    .. math:: W' = W_0 + s (B A - B_0 A_0)

    The papers replace the frozen weight by the residual :math:`W_0 - s B_0 A_0`. Here it stays
    unchanged, and the initial product is subtracted instead. The two products are written as one,

    .. math:: B A - B_0 A_0 = [B - B_0, B_0] \begin{bmatrix} A \\ A - A_0 \end{bmatrix},

    which costs what a LoRA of twice the rank costs, is exactly zero at the start, and keeps the
    digits of a small difference.

    ``B0`` and ``A0`` are buffers that are saved with the delta. So the delta means the same
    wherever it is loaded: no decomposition is computed again, and no two libraries need to agree on
    one. A state is therefore twice as large as LoRA's.
    """

    reads_weight: ClassVar[bool] = True

    @property
    def split_axes(self) -> dict[str, tuple[int | None, int | None]]:  # type: ignore[override]
        """The axes of LoRA's factors, and the same of their anchors."""
        axes = dict(super().split_axes)
        return axes | {f"{self.name}_{key[-1]}0": axes[key] for key in ("lora_B", "lora_A")}

    def start(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``B0 (rows, r)`` and ``A0 (r, columns)`` in double precision."""
        raise NotImplementedError

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return ``B`` and ``A`` at their initial values, and these values as buffers."""
        # Copies: a slice of a decomposition would keep, and save, the whole decomposition.
        copied: Any = {
            "copy": True,
            "memory_format": torch.contiguous_format,
        } | self.factory_kwargs(matrix)
        b, a = (factor.to(**copied) for factor in self.start(matrix))
        return {
            "lora_B": b,
            "lora_A": a,
            f"{self.name}_B0": nn.Buffer(b.clone()),
            f"{self.name}_A0": nn.Buffer(a.clone()),
        }

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return factors of :math:`s (B A - B_0 A_0)`, of rank ``2 r``."""
        return super().factors(self.difference(parameters))

    def scaled_low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return factors of twice the rank, and the scaling."""
        b, a = self.difference(parameters).values()
        return b, a, self.scaling

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply ``B`` and ``B0`` by the number."""
        start = f"{self.name}_B0"
        return super().multiplied(parameters, number) | {start: parameters[start] * number}

    def anchors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``B0`` and ``A0`` under the names of ``B`` and ``A``."""
        b0, a0 = parameters[f"{self.name}_B0"], parameters[f"{self.name}_A0"]
        return {"lora_B": b0, "lora_A": a0}

    def difference(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return factors of twice the rank whose product is ``B A - B0 A0``."""
        trained = parameters["lora_B"], parameters["lora_A"]
        b0, a0 = self.anchors(parameters).values()
        left, right = difference(trained, (b0, a0))
        return {"lora_B": left, "lora_A": right}


def difference(trained: Factors, start: Factors) -> Factors:
    """Return factors of twice the rank whose product is that of `trained` minus that of `start`.

    The product is exactly zero if both are the same, and keeps the digits of a small difference.
    """
    (b, a), (b0, a0) = trained, start
    return torch.cat([b - b0, b0], -1), torch.cat([a, a - a0], -2)


@dataclass(frozen=True)
class AnchoredMethod(RankedMethod):
    r"""Base of methods whose factors are made of values that all layers share.

    .. math:: W' = W_0 + c \, (B A - B_0 A_0)

    The papers start at :math:`B_0 A_0`, which is not zero, and so at a changed network. Here that
    product is subtracted, as in `AnchoredLoRA`. What it is made of is drawn from a seed or saved,
    so that a delta means the same wherever it is loaded. The buffer ``<name>_c ()`` is saved too.
    It is one until the delta is multiplied by a number: both factors depend on the same values, so
    these values have no multiple with that effect.
    """

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return `B` and `A`."""
        raise NotImplementedError

    def anchors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return ``B0`` and ``A0``: what `factors` returned at the start, bit for bit."""
        raise NotImplementedError

    def multiplier(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the buffer of `c`, for `init_parameters`."""
        return {f"{self.name}_c": nn.Buffer(torch.ones((), **self.factory_kwargs(matrix)))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + c (B A - B0 A0)``."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Return factors of twice the rank."""
        left, right = difference(self.factors(parameters), self.anchors(parameters))
        return left * parameters[f"{self.name}_c"], right

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `c` by the number."""
        c = f"{self.name}_c"
        return {**parameters, c: parameters[c] * number}


AnchoredMethod.forwards = low_rank_forwards()


def _linear(
    method: AnchoredLoRA,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 x + bias + s B A dropout(x) - s B0 A0 x``."""
    if not (method.lora_dropout and training):
        return linear(method, parameters, x, product, bias, training)
    trained, start = (
        LoRA.factors(method, given) for given in (parameters, method.anchors(parameters))
    )
    dropped = F.dropout(x, method.lora_dropout)
    output = low_rank_product(x, product, bias, trained, dropped)
    left, right = start
    side = F.linear(F.linear(x.to(right.dtype), right), left)
    return (output - side).to(output.dtype)


def _conv(self: Any, input: Tensor) -> Tensor:
    """The same for convolutions: with dropout, only the input of ``B A`` is dropped."""
    delta = self._gift_weights["weight"]
    if not (delta.method.lora_dropout and self.training):
        return conv(self, input)
    method, parameters = delta.delta_of(self)
    trained, start = (
        delta.layout.to_weight(torch.matmul(*LoRA.factors(method, factors)))
        for factors in (parameters, method.anchors(parameters))
    )
    output = convolve(self, input, self._gift_frozen("weight"), self.bias)
    x = input.to(trained.dtype)
    change = convolve(self, F.dropout(x, method.lora_dropout), trained, None)
    return (output + change - convolve(self, x, start, None)).to(output.dtype)


AnchoredLoRA.forwards = linear_forwards(_linear) | conv_forwards(_conv)
