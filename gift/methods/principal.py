"""Methods that change the weight between its principal singular vectors: LoRA-XS and PSOFT."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gift.errors import AdaptationError
from gift.kernels.low_rank import low_rank_forwards
from gift.methods.base import RankedMethod, ScaledMethod, register_method
from gift.methods.blocks import rotation_change
from gift.methods.factors import signed, svd
from gift.methods.settings import flag


@dataclass(frozen=True)
class PrincipalMethod(RankedMethod):
    r"""Base of methods whose update is ``r`` times ``r`` numbers between singular vectors.

    .. math:: W' = W_0 + U_r \Sigma_r X V_r^H, \quad W_0 = U \operatorname{diag}(\sigma) V^H

    The buffers ``<prefix>_B (rows, r)``, which is :math:`U_r \Sigma_r`, and ``<prefix>_A (r,
    columns)``, which is :math:`V_r^H`, are never saved but recomputed from the weight. The result
    is reproducible even where singular values are equal or nearly so, and signs are settled, see
    `gift.methods.factors`.
    """

    prefix: ClassVar[str]
    """The prefix of the names of parameters and buffers."""

    conv_layouts = ("out_as_h", "balanced")
    reads_weight: ClassVar[bool] = True

    def start(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the trained parameters for a frozen matrix."""
        raise NotImplementedError

    def between(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``X``, exactly zero for the parameters that `start` gives."""
        raise NotImplementedError

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the trained parameters, and the factors of the frozen matrix."""
        factors = self.derived(matrix).items()
        return self.start(matrix) | {key: nn.Buffer(f, persistent=False) for key, f in factors}

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the singular vectors of the largest values, the left ones times these."""
        u, sigma, vh = signed(*svd(matrix.detach()))
        # Copies: a slice of a decomposition would keep the whole decomposition.
        like: Any = {"copy": True, "memory_format": torch.contiguous_format}
        like |= self.factory_kwargs(matrix)
        left = u[..., : self.rank] * sigma[..., None, : self.rank]
        right = vh[..., : self.rank, :]
        return {f"{self.prefix}_B": left.to(**like), f"{self.prefix}_A": right.to(**like)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`W_0 + U \Sigma X V^H`."""
        left, right = self.low_rank(parameters)
        return matrix + left @ right

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return :math:`U \Sigma X` and :math:`V^H`, which needs no gradient."""
        left = parameters[f"{self.prefix}_B"]
        return left @ self.between(parameters).to(left.dtype), parameters[f"{self.prefix}_A"]


PrincipalMethod.forwards = low_rank_forwards()


@register_method
@dataclass(frozen=True)
class LoRAXS(ScaledMethod, PrincipalMethod):
    r"""LoRA with extremely few parameters (Bałazy et al. 2024, https://arxiv.org/abs/2405.17604).

    .. math:: W' = W_0 + \frac{\alpha}{r} U_r \Sigma_r R V_r^H, \quad
        W_0 = U \operatorname{diag}(\sigma) V^H

    `R` mixes the `r` largest singular directions of the weight. For a matrix ``(rows, columns)`` it
    adds ``xs_R (r, r)``, which starts at zero (the paper draws it with a deviation of 1e-5): ``r *
    r`` parameters, whatever the size of the weight. The factors are buffers, see `PrincipalMethod`.

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
    prefix: ClassVar[str] = "xs"
    derives: ClassVar[tuple[str, ...]] = ("xs_B", "xs_A")
    default_rank: ClassVar[int] = 8

    def start(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero `R`."""
        assert self.rank is not None
        shape = (*matrix.shape[:-2], self.rank, self.rank)
        return {"xs_R": torch.zeros(shape, **self.factory_kwargs(matrix))}

    def between(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return `R` times the scaling."""
        return self.scaling * parameters["xs_R"]

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply `R` by the number."""
        return {**parameters, "xs_R": parameters["xs_R"] * number}


@register_method
@dataclass(frozen=True)
class PSOFT(PrincipalMethod):
    r"""Orthogonal fine-tuning in the principal subspace (Wu et al. 2025,
    https://arxiv.org/abs/2505.11235).

    .. math:: W' = W_0 + U_r \Sigma_r (\operatorname{diag}(\beta) R \operatorname{diag}(\alpha) - I)
        V_r^H, \quad R = (I + Q)(I - Q)^{-1}, \quad Q = -Q^H

    The part of the weight in its `r` largest singular directions is rotated and rescaled within
    them, and the rest stays. For a matrix ``(rows, columns)`` it adds ``psoft_Q (r (r-1) / 2,)``,
    the upper triangle of `Q`, which starts at zero, and ``psoft_beta (r,)`` and ``psoft_alpha
    (r,)``, which start at one: ``r (r-1) / 2 + 2 r`` parameters, whatever the size of the weight. A
    weight with one direction, as a vector is, has no `Q`. The factors are buffers, see
    `PrincipalMethod`.

    PEFT computes the singular vectors anew on each machine, with signs that may differ, and `Q`
    means another rotation then.

    Args:
        rank: `r`. None means 32, or less for a smaller matrix.
        rescale: whether to train :math:`\alpha` and :math:`\beta`.
        clip_rank: whether a matrix that cannot have the rank gets its largest one; see
            `RankedMethod`.
        dtype: dtype of parameters and factors, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "psoft"
    strategy_prefix: ClassVar[str] = "PSOFT"
    prefix: ClassVar[str] = "psoft"
    derives: ClassVar[tuple[str, ...]] = ("psoft_B", "psoft_A")
    default_rank: ClassVar[int] = 32

    rescale: bool = flag(True)

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its rank settled for a matrix ``(..., rows, columns)``."""
        fitted = super().fit(shape)
        if fitted.rank == 1 and not self.rescale:
            raise AdaptationError(
                "one singular direction has nothing to rotate (a higher rank, or rescale=True, "
                "would work)"
            )
        return fitted

    def start(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a zero `Q` and scales of one."""
        rank = self.rank
        assert rank is not None
        groups, like = matrix.shape[:-2], self.factory_kwargs(matrix)
        made = {"psoft_Q": torch.zeros(*groups, rank * (rank - 1) // 2, **like)} if rank > 1 else {}
        scales = ("psoft_beta", "psoft_alpha") if self.rescale else ()
        return made | {name: torch.ones(*groups, rank, **like) for name in scales}

    def between(self, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Compute :math:`\operatorname{diag}(\beta) R \operatorname{diag}(\alpha) - I`."""
        assert self.rank is not None
        turned = None
        if self.rank > 1:
            turned = rotation_change(parameters["psoft_Q"], self.rank).mH
        if not self.rescale:
            assert turned is not None
            return turned
        beta, alpha = parameters["psoft_beta"], parameters["psoft_alpha"]
        longer = torch.diag_embed(beta * alpha - 1)
        if turned is None:
            return longer
        return beta.unsqueeze(-1) * turned * alpha.unsqueeze(-2) + longer
