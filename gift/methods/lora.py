"""LoRA (low-rank adaptation) and its rank-stabilised scaling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.cost_model import Form
from gift.kernels.low_rank import low_rank_forwards
from gift.kernels.products import scaled
from gift.methods.base import RankedMethod, register_method
from gift.methods.draws import kaiming_uniform
from gift.methods.settings import flag, form_of_computing, number, probability


@register_method
@dataclass(frozen=True)
class LoRA(RankedMethod):
    r"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    .. math:: W' = W_0 + \frac{\alpha}{r} B A

    For a matrix ``(rows, columns)`` it adds ``lora_B (rows, r)``, which starts at zero, and
    ``lora_A (r, columns)``, Kaiming-uniform with ``a = sqrt(5)`` as in ``nn.Linear``, that is
    uniform in ``±1/sqrt(columns)``. A weight with groups has such a pair for each group, with the
    group as first axis. That is ``r * (rows + columns)`` parameters for each matrix.

    Args:
        rank: `r`. None means 3, or less for a smaller matrix.
        lora_alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        lora_dropout: probability with which an input of the delta is dropped while training. Where
            the layer reads its weight itself (recurrent layers, attention, raw parameters) one mask
            over the input features serves the whole batch.
        use_rslora: scale by :math:`\alpha / \sqrt{r}` (Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        form: how linear layers and convolutions are computed: ``"merged"``, ``"side"`` or
            ``"whole"``, see `gift.kernels.cost_model`. None chooses the cheapest by shapes.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of the factors, or its name; None means the weight's, but at least float32.

    Raises:
        ValueError: if settings are out of range.
    """

    name: ClassVar[str] = "lora"
    strategy_prefix: ClassVar[str] = "LoRA"
    shows_matrix: ClassVar[bool] = True
    split_axes = {"lora_B": (0, None), "lora_A": (None, 1)}

    lora_alpha: float | None = number(None)
    lora_dropout: float = probability()
    use_rslora: bool = flag()
    form: Form | None = form_of_computing()  # type: ignore[misc]  # noqa: RUF009 - gives a field, which others lack

    @property
    def dropout(self) -> float:  # type: ignore[override]
        """The dropout probability for `drop`."""
        return self.lora_dropout

    @property
    def scaling(self) -> float:
        """The factor that multiplies ``B A``."""
        rank = self.rank or self.default_rank
        alpha = rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def compat_settings(self) -> dict[str, Any]:
        """The rank and the scaling."""
        return {"rank": self.rank, "scaling": self.scaling}

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero ``B`` and a random ``A``: the effective weight starts at the frozen one."""
        *groups, rows, columns = matrix.shape
        assert self.rank is not None
        like = self.factory_kwargs(matrix)
        return {
            "lora_B": torch.zeros(*groups, rows, self.rank, **like),
            "lora_A": kaiming_uniform(*groups, self.rank, columns, **like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`W_0 + s B A`."""
        return matrix + self.delta(parameters)

    def delta(self, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`s B A`."""
        left, right = self.factors(parameters)
        return left @ right

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``s B`` and ``A``."""
        return scaled(parameters["lora_B"], self.scaling), parameters["lora_A"]

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the factors."""
        return self.factors(parameters)

    def scaled_low_rank(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float] | None:
        """Return `B`, `A` and the scaling."""
        return parameters["lora_B"], parameters["lora_A"], self.scaling

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply ``B`` by the number."""
        return {**parameters, "lora_B": parameters["lora_B"] * number}

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop input features: columns of ``A``, or rows of ``B`` in embeddings."""
        key = "lora_A" if input_axis == -1 else "lora_B"
        factor = parameters[key]
        features = factor.shape[input_axis]
        mask = F.dropout(factor.new_ones(features), self.lora_dropout)
        return {**parameters, key: factor * (mask if input_axis == -1 else mask[:, None])}


@register_method
@dataclass(frozen=True)
class RsLoRA(LoRA):
    r"""Rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).

    .. math:: W' = W_0 + \frac{\alpha}{\sqrt{r}} B A

    Shapes, parameters and arguments are those of `LoRA`. It is the same as `LoRA` with
    `use_rslora`.
    """

    name: ClassVar[str] = "rslora"
    strategy_prefix: ClassVar[str] = "RsLoRA"
    shares_names: ClassVar[bool] = True

    use_rslora: bool = flag(True)


LoRA.forwards = low_rank_forwards()
