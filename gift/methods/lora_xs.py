"""LoRA-XS: a small trained matrix between frozen singular vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.kernels.low_rank import low_rank_forwards
from gift.methods.base import RankedMethod, register_method
from gift.methods.factors import signed, svd
from gift.methods.settings import number


@register_method
@dataclass(frozen=True)
class LoRAXS(RankedMethod):
    r"""LoRA with extremely few parameters (Bałazy et al. 2024, https://arxiv.org/abs/2405.17604).

    .. math:: W' = W_0 + \frac{\alpha}{r} U_r \Sigma_r R V_r^H, \quad
        W_0 = U \operatorname{diag}(\sigma) V^H

    `R` mixes the `r` largest singular directions of the weight. For a matrix ``(rows, columns)`` it
    adds ``xs_R (r, r)``, which starts at zero (the paper draws it with a deviation of 1e-5): ``r *
    r`` parameters, whatever the size of the weight. The buffers ``xs_B (rows, r)``, which is
    :math:`U_r \Sigma_r`, and ``xs_A (r, columns)``, which is :math:`V_r^H`, are never saved but
    recomputed from the weight. The result is reproducible even where singular values are equal or
    nearly so, and signs are settled, see `gift.methods.factors`.

    Args:
        rank: `r`. None means 8, or less for a smaller matrix.
        alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of `R` and the factors, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "lora_xs"
    strategy_prefix: ClassVar[str] = "LoRAXS"
    conv_layouts = ("out_as_h", "balanced")
    reads_weight: ClassVar[bool] = True
    derives: ClassVar[tuple[str, ...]] = ("xs_B", "xs_A")
    default_rank: ClassVar[int] = 8

    alpha: float | None = number(None)

    @property
    def scaling(self) -> float:
        """The factor that multiplies the product."""
        return 1.0 if self.alpha is None else self.alpha / (self.rank or self.default_rank)

    @property
    def compat_settings(self) -> dict[str, Any]:
        """The rank and the scaling."""
        return {"rank": self.rank, "scaling": self.scaling}

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero `R`, and the factors of the frozen matrix."""
        rank = self.rank
        assert rank is not None
        zeros = torch.zeros(*matrix.shape[:-2], rank, rank, **self.factory_kwargs(matrix))
        factors = self.derived(matrix).items()
        return {"xs_R": zeros} | {key: nn.Buffer(f, persistent=False) for key, f in factors}

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the singular vectors of the largest values, the left ones times these."""
        u, sigma, vh = signed(*svd(matrix.detach()))
        # Copies: a slice of a decomposition would keep the whole decomposition.
        like: Any = {"copy": True, "memory_format": torch.contiguous_format}
        like |= self.factory_kwargs(matrix)
        left = u[..., : self.rank] * sigma[..., None, : self.rank]
        return {"xs_B": left.to(**like), "xs_A": vh[..., : self.rank, :].to(**like)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`W_0 + s U \Sigma R V^H`."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return :math:`s U \Sigma R` and :math:`V^H`, which needs no gradient."""
        return parameters["xs_B"] @ (self.scaling * parameters["xs_R"]), parameters["xs_A"]

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `R` by the number."""
        return {**parameters, "xs_R": parameters["xs_R"] * number}


LoRAXS.forwards = low_rank_forwards()
