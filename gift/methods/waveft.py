"""WaveFT: a few wavelet coefficients of the update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift.methods.base import register_method
from gift.methods.settings import number
from gift.methods.sparse import SparseMethod


@register_method
@dataclass(frozen=True)
class WaveFT(SparseMethod):
    r"""Wavelet fine-tuning (Bilican et al. 2025, https://arxiv.org/abs/2505.12532).

    .. math:: W' = W_0 + \alpha \operatorname{IDWT}(C), \quad
        C_{j, k} = \sum_{l=1}^{n} c_l \, [(j, k) = E_l]

    The transform is one level of Haar's wavelet (``"db1"``), the paper's choice: a quarter of `C`
    holds means of 2 x 2 elements, the others their differences along rows, columns and diagonals.
    Sides of odd length are extended by one, and the result is cut. For a matrix ``(rows, columns)``
    it adds ``waveft_c (n,)``, the coefficients, which start at zero: `n` parameters, for each group
    of a weight with groups. A buffer ``waveft_E (n,)`` holds their positions in the flattened
    matrix. It is never saved but drawn from the seed, as in PEFT, and is the same for all matrices
    of one shape. The groups of a weight have different entries.

    Args:
        n_frequency: `n`, up to ``rows * columns``. None means 2592, PEFT's default, or less for a
            smaller matrix.
        scaling: :math:`\alpha`. The default is PEFT's.
        seed: seed for the choice of the entries.
        clip_n_frequency: whether a matrix with fewer entries than `n_frequency` gets all of them
            instead of an error.
        dtype: dtype of the coefficients, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "waveft"
    strategy_prefix: ClassVar[str] = "WaveFT"
    default_n_frequency: ClassVar[int] = 2592

    scaling: float = number(25.0)

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + alpha IDWT(C)``."""
        *groups, rows, columns = matrix.shape
        height, width = rows + rows % 2, columns + columns % 2
        values, where = parameters["waveft_c"].to(matrix.dtype), parameters["waveft_E"]
        places = where // columns * width + where % columns
        flat = matrix.new_zeros(*groups, height * width).scatter(-1, places, values)
        change = _inverse(flat.unflatten(-1, (height, width)))[..., :rows, :columns]
        return matrix + self.scaling * change


def _inverse(coefficients: Tensor) -> Tensor:
    """Return the inverse Haar transform of one level, of matrices with even sides."""
    upper, lower = coefficients.chunk(2, -2)
    (mean, down), (across, both) = upper.chunk(2, -1), lower.chunk(2, -1)
    # Each 2 x 2 elements from a mean and its differences down, across and along the diagonal.
    top = torch.stack([mean + down + across + both, mean + down - across - both], -1)
    bottom = torch.stack([mean - down + across - both, mean - down - across + both], -1)
    return torch.stack([top, bottom], -3).flatten(-2).flatten(-3, -2) / 2
