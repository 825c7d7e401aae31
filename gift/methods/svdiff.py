"""SVDiff: shifts of the singular values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gift.methods.base import Method, register_method
from gift.methods.factors import svd


@register_method
@dataclass(frozen=True)
class SVDiff(Method):
    r"""Spectral shifts (Han et al. 2023, https://arxiv.org/abs/2303.11305).

    .. math:: W' = U \operatorname{diag}(\operatorname{ReLU}(\sigma + \delta)) V^T,
        \quad W_0 = U \operatorname{diag}(\sigma) V^T

    For a matrix ``(rows, columns)`` it adds ``svdiff_delta (n,)`` with ``n = min(rows, columns)``,
    starting at zero: `n` parameters. The buffers ``svdiff_U (rows, n)``, ``svdiff_sigma (n,)`` and
    ``svdiff_Vh (n, columns)`` take twice the memory of a square weight. They are never saved but
    recomputed from the weight. The result is reproducible even where singular values are equal or
    nearly so, see `gift.methods.factors`.

    The effective weight is computed as ``W0 + U diag(ReLU(sigma + delta) - sigma) V^T``, which is
    the same and exact at the start. A singular value of zero can be raised, since the gradient of
    ReLU at zero is taken from above.

    Args:
        dtype: dtype of the shifts and factors, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "svdiff"
    strategy_prefix: ClassVar[str] = "SVDiff"
    conv_layouts = ("out_as_h", "balanced")
    reads_weight: ClassVar[bool] = True
    derives: ClassVar[tuple[str, ...]] = ("svdiff_U", "svdiff_sigma", "svdiff_Vh")

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zero shifts, and the factors of the frozen matrix."""
        factors = self.derived(matrix)
        delta = torch.zeros_like(factors["svdiff_sigma"])
        buffers = {key: nn.Buffer(factor, persistent=False) for key, factor in factors.items()}
        return {"svdiff_delta": delta, **buffers}

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the factors of the matrix, constants in every gradient."""
        u, sigma, vh = svd(matrix.detach())
        like = self.factory_kwargs(matrix)
        real: dict[str, Any] = like | {"dtype": torch.empty(0, dtype=like["dtype"]).real.dtype}
        return {
            "svdiff_U": u.to(**like),
            "svdiff_sigma": sigma.to(**real),
            "svdiff_Vh": vh.to(**like),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + U diag(ReLU(sigma + delta) - sigma) V^T``."""
        sigma = parameters["svdiff_sigma"]
        shifted = sigma + parameters["svdiff_delta"]
        raised = torch.where(shifted < 0, 0, shifted)  # NaN stays NaN
        change = raised - sigma
        scaled = parameters["svdiff_U"] * change.unsqueeze(-2)
        return matrix + scaled @ parameters["svdiff_Vh"]
