"""WaveFT: a few wavelet coefficients of the update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.methods.base import Method, register_method
from gift.methods.draws import entries, seeded_buffer
from gift.methods.settings import flag, number, whole


@register_method
@dataclass(frozen=True)
class WaveFT(Method):
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
    size_setting: ClassVar[str | None] = "n_frequency"
    default_n_frequency: ClassVar[int] = 2592

    n_frequency: int | None = whole(None)
    scaling: float = number(25.0)
    seed: int = whole(777, least=0)
    clip_n_frequency: bool | None = flag(None, enters_weight=False, kw_only=True)

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its number of coefficients settled."""
        rows, columns = shape[-2:]
        wanted = self.default_n_frequency if self.n_frequency is None else self.n_frequency
        return self.settled(
            min(wanted, rows * columns),
            f"n_frequency {wanted} is above {rows * columns}, the entries of a matrix of "
            f"{rows} x {columns} (a smaller one, or clip_n_frequency=True, would work)",
        )

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zero coefficients, at entries drawn from the seed."""
        assert self.n_frequency is not None
        shape = (*matrix.shape[:-2], self.n_frequency)
        size = math.prod(matrix.shape[-2:])
        return {
            "waveft_c": torch.zeros(shape, **self.factory_kwargs(matrix)),
            "waveft_E": seeded_buffer(entries, self.seed, shape, size, device=matrix.device),
        }

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + alpha IDWT(C)``."""
        *groups, rows, columns = matrix.shape
        height, width = rows + rows % 2, columns + columns % 2
        values, where = parameters["waveft_c"].to(matrix.dtype), parameters["waveft_E"]
        places = where // columns * width + where % columns
        flat = matrix.new_zeros(*groups, height * width).scatter(-1, places, values)
        change = _inverse(flat.unflatten(-1, (height, width)))[..., :rows, :columns]
        return matrix + self.scaling * change

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the coefficients by the number."""
        return {**parameters, "waveft_c": parameters["waveft_c"] * number}


def _inverse(coefficients: Tensor) -> Tensor:
    """Return the inverse Haar transform of one level, of matrices with even sides."""
    upper, lower = coefficients.chunk(2, -2)
    (mean, down), (across, both) = upper.chunk(2, -1), lower.chunk(2, -1)
    # Each 2 x 2 elements from a mean and its differences down, across and along the diagonal.
    top = torch.stack([mean + down + across + both, mean + down - across - both], -1)
    bottom = torch.stack([mean - down + across - both, mean - down - across + both], -1)
    return torch.stack([top, bottom], -3).flatten(-2).flatten(-3, -2) / 2
