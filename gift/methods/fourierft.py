"""FourierFT: a few coefficients of the update's spectrum."""

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
class FourierFT(SparseMethod):
    r"""Discrete Fourier transform (Gao et al. 2024, https://arxiv.org/abs/2405.03003).

    .. math:: W' = W_0 + \alpha \operatorname{Re}(\operatorname{IDFT2}(F)), \quad
        F_{j, k} = \sum_{l=1}^{n} c_l \, [(j, k) = E_l]

    For a matrix ``(rows, columns)`` it adds ``fourierft_c (n,)``, the spectral coefficients. That
    is `n` parameters, for each group of a weight with groups. A buffer ``fourierft_E (n,)`` holds
    their positions in the flattened spectrum. It is never saved but drawn from the seed, as in
    PEFT, and is the same for all matrices of one shape. The groups of a weight have different
    entries. The inverse transform divides by ``rows * columns``. A complex weight has complex
    coefficients, and uses the whole transform instead of its real part.

    The coefficients start at zero, so that the update is zero. The paper draws them from a standard
    normal distribution, and so starts from a changed network.

    Args:
        n_frequency: `n`, up to ``rows * columns``. None means 1000, the paper's for GLUE, or less
            for a smaller matrix.
        scaling: :math:`\alpha`. The default is PEFT's. The paper uses 100 or 150 for GLUE, and 300
            for instruction tuning and images.
        seed: seed for the choice of the entries.
        clip_n_frequency: whether a matrix with fewer entries than `n_frequency` gets all of them
            instead of an error.
        dtype: dtype of the coefficients, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "fourierft"
    strategy_prefix: ClassVar[str] = "FourierFT"
    default_n_frequency: ClassVar[int] = 1000

    scaling: float = number(150.0)

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + alpha Re(IDFT2(F))``."""
        # No device transforms 16-bit numbers in all shapes.
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        values, where = parameters["fourierft_c"].to(dtype), parameters["fourierft_E"]
        spectrum = torch.zeros_like(matrix, dtype=dtype).flatten(-2).scatter(-1, where, values)
        change: Tensor = torch.fft.ifft2(spectrum.view(matrix.shape))
        change = change if matrix.is_complex() else change.real
        return matrix + (self.scaling * change).to(matrix.dtype)
